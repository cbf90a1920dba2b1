"""DeePMD folders, through dpdata."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.readers.symbols import numbers_of

MARKER = "type.raw"
"""File by which a folder is known as a DeePMD system."""


@reader(marker=MARKER)
def read_deepmd(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Read a DeePMD system: type.raw, type_map.raw and the arrays of set.*; one system at a time is held in memory.

    Raises SourceError if dpdata cannot read it, or its types change from frame to frame (deepmd/npy/mixed).
    """
    dpdata = optional_module("dpdata", "dpdata", f"{path}: reading a DeePMD folder")
    if not (path / MARKER).is_file():
        raise SourceError(f"{path} is no DeePMD system: there is no {MARKER} in it.")
    if any(path.glob("set.*/real_atom_types.npy")):
        raise SourceError(f"{path} is of mixed type; convert it with dpdata into plain deepmd/npy systems first.")
    try:
        system = dpdata.LabeledSystem(str(path), fmt="deepmd/npy")
    except Exception as error:  # what dpdata and NumPy raise by the kind of damage
        raise SourceError(f"{path} cannot be read by dpdata ({brief(error)}).") from error
    data = system.data
    symbols = [data["atom_names"][kind] for kind in data["atom_types"]]
    periodic = not system.nopbc
    maker = FrameMaker(settings)
    frames = len(data["coords"])

    def read(number: int) -> Frame:
        source_id = f"{path.name}#{number}"
        try:
            numbers = numbers_of(symbols)
        except StructureError as error:
            return Frame(source_id=source_id, error=error)
        raw = RawFrame(
            numbers=numbers,
            positions=data["coords"][number],
            cell=data["cells"][number] if periodic else np.zeros((3, 3)),
            pbc=periodic,
            energy=data["energies"][number],
            forces=data["forces"][number],
            virial=data["virials"][number] if "virials" in data else None,
        )
        return maker.make(raw, source_id, {"system": path.name})

    for number in range(frames):
        yield UnreadFrame(source_id=f"{path.name}#{number}", read=partial(read, number), fraction=(number + 1) / frames)
