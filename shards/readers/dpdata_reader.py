"""DeePMD folders, read by dpdata."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hydrazero.shards.conditions import condition_named
from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.readers.symbols import numbers_of

MARKER = "type.raw"
"""Name of a file that every DeePMD system holds."""

KEYS = {"energy": "energies", "forces": "forces", "virial": "virials"}
"""Label -> key of dpdata."""


@reader(marker=MARKER)
def read_deepmd(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of a DeePMD system: type.raw, type_map.raw and the arrays of set.*; it must fit into memory.

    A system may lack energies, forces or virials in all of its sets. A charge or multiplicity is read from files such
    as charge.npy. Raises SourceError if dpdata cannot read the system, if its sets hold different labels, or if its
    types differ between frames (deepmd/npy/mixed).
    """
    dpdata = optional_module("dpdata", "dpdata", f"{path}: reading a DeePMD folder")
    if not (path / MARKER).is_file():
        raise SourceError(f"{path} is not a DeePMD system: it has no file {MARKER}.")
    if any(path.glob("set.*/real_atom_types.npy")):
        raise SourceError(f"{path} has mixed types; convert it with dpdata into plain deepmd/npy systems first.")
    kind = dpdata.LabeledSystem if _labels(path)["energy"] else dpdata.System
    try:
        system = kind(str(path), fmt="deepmd/npy")
        data = system.data
        symbols = [data["atom_names"][number] for number in data["atom_types"]]
    except Exception as error:  # dpdata and NumPy raise errors of many kinds
        raise SourceError(f"{path} cannot be read by dpdata ({brief(error)}).") from error
    periodic = not system.nopbc
    maker = FrameMaker(settings)
    frames = len(data["coords"])
    conditions = _conditions(path, frames)

    def read(number: int) -> Frame:
        source_id = f"{path.name}#{number}"
        try:
            numbers = numbers_of(symbols)
        except StructureError as error:
            return Frame(source_id=source_id, error=error)
        fields = {name: values[number] for name, values in conditions.items()}
        raw = RawFrame(
            numbers=numbers,
            positions=data["coords"][number],
            cell=data["cells"][number] if periodic else np.zeros((3, 3)),
            pbc=periodic,
            **{label: data[key][number] for label, key in KEYS.items() if key in data},
            charge=fields.get(settings.fields.charge),
            multiplicity=fields.get(settings.fields.multiplicity),
        )
        return maker.make(raw, source_id, {**fields, "system": path.name})

    for number in range(frames):
        yield UnreadFrame(source_id=f"{path.name}#{number}", read=partial(read, number), fraction=(number + 1) / frames)


def _conditions(path: Path, frames: int) -> dict[str, list[Any]]:
    """Return the numbers of each frame in files that are named like a charge or a spin, which dpdata leaves out."""
    found = {}
    for name in sorted({file.stem for file in path.glob("set.*/*.npy") if condition_named(file.stem)}):
        try:
            arrays = [np.load(file, allow_pickle=False) for file in sorted(path.glob(f"set.*/{name}.npy"))]
        except (OSError, ValueError, EOFError):
            continue
        values = np.concatenate([array.reshape(-1) for array in arrays])
        if len(values) == frames:  # others are numbers of atoms
            found[name] = values.tolist()
    return found


def _labels(path: Path) -> dict[str, bool]:
    """Return which labels the sets of a system hold; raise SourceError for one that only some of the sets hold."""
    sets = sorted(path.glob("set.*"))
    found: dict[str, bool] = {}
    for label, name in {"energy": "energy.npy", "forces": "force.npy", "virial": "virial.npy"}.items():
        held = [(folder / name).is_file() for folder in sets]
        if any(held) and not all(held):
            lacks = sets[held.index(False)].name
            raise SourceError(f"{path}: {lacks} has no {name}, other sets have one; convert them separately.")
        found[label] = any(held)
    return found
