"""NumPy archives of one molecule in many geometries, in the layouts of sGDML and rMD17."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.column_names import listed
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.hdf5_reader import RaggedArrays
from hydrazero.shards.readers.parts.frame_parts import frame_of_parts, names_in, unread_conditions
from hydrazero.shards.readers.parts.shared import shared_parts
from hydrazero.shards.readers.parts.stated_units import units_by_key, with_stated_units

LAYOUTS = (
    {"numbers": "z", "positions": "R", "energy": "E", "forces": "F"},
    {"numbers": "nuclear_charges", "positions": "coords", "energy": "energies", "forces": "forces"},
)
"""Keys of the sGDML layout (Chmiela et al. 2019) and of rMD17 (Christensen and von Lilienfeld 2020)."""

LATTICE = "lattice"
"""Key of the lattice vectors in the sGDML layout, which are the columns of the matrix."""


@reader(suffixes=(".npz",))
def read_npz(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of an archive: one molecule in many geometries, or ragged arrays if the settings have [columns].

    The units in 'e_unit' and 'r_unit' are used, and an archive with a 'lattice' is periodic. Raises SourceError if the
    keys or shapes do not fit, or if the settings contradict the units.
    """
    arrays = _arrays(path)
    stated = units_by_key({name: array for name, array in arrays.items() if array.size == 1}, "key")
    if settings.columns:
        ragged = RaggedArrays(path, arrays, settings, np.ndarray)
        settings = with_stated_units(settings, stated, path, ragged.parts)
        yield from ragged.frames(FrameMaker(settings))
        return
    names = _names(path, arrays, settings)
    # The stress of an archive has the unit of [units]; no layout has one.
    maker = FrameMaker(with_stated_units(settings, stated, path, names))
    columns = {part: arrays[name] for part, name in names.items()}
    frames = len(columns["positions"])
    targets = {target.field: target for target in settings.targets.values()}
    try:
        shared = shared_parts(columns, names, frames, columns["positions"].shape[1], targets)
    except StructureError as error:
        raise SourceError(f"{path}: {error}.") from error

    unread = unread_conditions(arrays, set(names.values()), frames)

    def read(number: int) -> Frame:
        parts: dict[str, Any] = {part: array if part in shared else array[number] for part, array in columns.items()}
        if names.get("cell") == LATTICE and np.shape(parts["cell"]) == (3, 3):
            parts["cell"] = np.transpose(parts["cell"])
        info = {name: values[number] for name, values in unread.items()}
        return frame_of_parts(parts, f"{path.name}#{number}", maker, info=info, other=parts)

    for number in range(frames):
        source_id = f"{path.name}#{number}"
        yield UnreadFrame(source_id=source_id, read=partial(read, number), fraction=(number + 1) / frames)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return all arrays by name; raise SourceError if the archive cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # depends on the damage: OSError, BadZipFile, zlib.error, ValueError, EOFError, ...
        is_archive = zipfile.is_zipfile(path)
        if is_archive and "allow_pickle" in str(error):
            raise SourceError(
                f"{path} holds arrays of Python objects, which are pickles and not read; save arrays of "
                "numbers, with structures of several sizes one after the other and their numbers of atoms."
            ) from error
        raise SourceError(
            f"{path} is not a readable npz archive ({brief(error) if is_archive else 'it is no zip archive'}); "
            "copy it again if it should be one."
        ) from error


def _names(path: Path, arrays: Mapping[str, NDArray[Any]], settings: ReadSettings) -> dict[str, str]:
    """Return part -> key of the archive; raise SourceError for another layout or wrong shapes."""
    layout = next((names for names in LAYOUTS if {names["positions"], names["numbers"]} <= set(arrays)), None)
    if layout is None:
        raise SourceError(
            f"{path} has the keys {listed(arrays)}, neither those of sGDML nor of rMD17; name its arrays under "
            "[columns]."
        )
    chosen = {part for part in settings.fields.model_fields_set if getattr(settings.fields, part) != part}
    names = {**names_in(settings, arrays), "cell": LATTICE if LATTICE in arrays else "cell"}
    names |= {part: name for part, name in layout.items() if part not in chosen}
    names = {part: name for part, name in names.items() if name in arrays}
    shape = arrays[names["positions"]].shape
    if len(shape) != 3:
        raise SourceError(f"{path}: '{names['positions']}' has shape {shape}, not (frames, atoms, 3).")
    return names
