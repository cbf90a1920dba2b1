"""NumPy archives of one molecule in many geometries, in the layouts of sGDML and rMD17."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings, UnreadFrame, reader
from hydrazero.shards.readers.hdf5_reader import RaggedArrays

LAYOUTS = (
    {"numbers": "z", "positions": "R", "energy": "E", "forces": "F"},
    {"numbers": "nuclear_charges", "positions": "coords", "energy": "energies", "forces": "forces"},
)
"""Keys of the sGDML layout (Chmiela et al. 2019) and of rMD17 (Christensen and von Lilienfeld 2020)."""


@reader(suffixes=(".npz",))
def read_npz(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of an archive: one molecule in many geometries, or ragged arrays if the settings have [columns].

    Raises SourceError if the keys or shapes do not fit.
    """
    maker = FrameMaker(settings)
    if settings.columns:
        yield from RaggedArrays(path, _arrays(path), settings, np.ndarray).frames(maker)
        return
    arrays = _arrays(path)
    columns = _columns(path, arrays)
    frames = len(columns["positions"])
    others = {target.field: arrays[target.field] for target in settings.targets.values() if target.field in arrays}
    for name, array in others.items():
        if array.shape[:1] != (frames,):
            raise SourceError(f"{path}: '{name}' has shape {array.shape}, not {frames} rows, one for each frame.")

    def read(number: int) -> Frame:
        raw = RawFrame(
            numbers=columns["numbers"],
            positions=columns["positions"][number],
            cell=np.zeros((3, 3)),
            pbc=False,
            energy=columns["energy"][number] if "energy" in columns else None,
            forces=columns["forces"][number] if "forces" in columns else None,
            other={name: others[name][number] for name in others},
        )
        return maker.make(raw, f"{path.name}#{number}", {})

    for number in range(frames):
        source_id = f"{path.name}#{number}"
        yield UnreadFrame(source_id=source_id, read=partial(read, number), fraction=(number + 1) / frames)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return all arrays by name; raise SourceError if the archive cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # depends on the damage: OSError, BadZipFile, zlib.error, ValueError, EOFError, ...
        raise SourceError(
            f"{path} is not a readable npz archive ({error}); copy it again if it should be one."
        ) from error


def _columns(path: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the arrays by the parts of a structure; raise SourceError for another layout or wrong shapes."""
    layout = next((names for names in LAYOUTS if {names["positions"], names["numbers"]} <= set(arrays)), None)
    if layout is None:
        raise SourceError(
            f"{path} has the keys {', '.join(arrays)}, neither those of sGDML nor of rMD17; name its arrays under "
            "[columns]."
        )
    columns = {name: arrays[key] for name, key in layout.items() if key in arrays}
    shape = columns["positions"].shape
    if len(shape) != 3:
        raise SourceError(f"{path}: '{layout['positions']}' has shape {shape}, not (frames, atoms, 3).")
    for name in ("energy", "forces"):
        if name in columns and columns[name].shape[:1] != shape[:1]:
            raise SourceError(f"{path}: '{layout[name]}' has shape {columns[name].shape}, the positions have {shape}.")
    return columns
