"""HDF5 files with a group for each molecule, reaction or conformer, such as ANI-1x, QM7-X and Transition1x."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.column_names import LABELS, column_names
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import COMPRESSIONS, READ_ERRORS, open_binary, optional_module

PER_ATOM = ("positions", "forces")


@reader(further_suffixes=(".h5", ".hdf5", ".xz"))  # QM7-X packs its files as '1000.xz'
def read_hdf5_groups(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of every group with numbers [atoms] and positions, [atoms, 3] or [frames, atoms, 3].

    The names of the groups around a frame become its fields 'group0' (the outermost), 'group1', ...; a group that
    several links reach is read once. A label that is NaN counts as absent. A compressed file is unpacked into a
    temporary one, since HDF5 needs to seek. Raises SourceError if the file is damaged, is not HDF5, or has no such
    group.
    """
    h5py = optional_module("h5py", "h5py", f"{path}: reading HDF5")
    maker, names = FrameMaker(settings), column_names(settings)
    found = False
    with _unpacked(path) as plain:
        try:
            file = h5py.File(plain, "r")
        except OSError as error:
            raise SourceError(
                f"{path} is not a readable HDF5 file ({brief(error)}); copy it again if it should be one."
            ) from error
        with file:
            for group, fraction in _groups(h5py, file, (names["numbers"], names["positions"])):
                found = True
                yield from _frames(group, path, fraction, names, maker)
    if not found:
        raise SourceError(
            f"{path} has no group with '{names['numbers']}' and '{names['positions']}', so its layout is another one; "
            "name the datasets under [columns]."
        )


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    if path.suffix.lower() not in COMPRESSIONS:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".h5") as plain:
        try:
            with open_binary(path) as (file, _):
                shutil.copyfileobj(file, plain)
        except READ_ERRORS as error:
            raise SourceError(f"{path} cannot be unpacked ({brief(error)}); copy it again.") from error
        plain.flush()
        yield Path(plain.name)


def _groups(h5py: Any, file: Any, wanted: tuple[str, str]) -> Iterator[tuple[Any, float]]:
    """Yield groups that have the wanted datasets, with the fraction of the outermost groups up to their end."""
    seen: set[Any] = set()

    def walk(group: Any) -> Iterator[Any]:
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            return
        seen.add(address)
        if all(isinstance(group.get(name), h5py.Dataset) for name in wanted):
            yield group
        for name in group:
            # A link to another file, or to nothing, is not a group of this file.
            if isinstance(group.get(name, getlink=True), h5py.HardLink | h5py.SoftLink):
                inner = group.get(name)
                if isinstance(inner, h5py.Group):
                    yield from walk(inner)

    top = list(file)
    if all(isinstance(file.get(name), h5py.Dataset) for name in wanted):
        yield file, 1.0
    for number, name in enumerate(top):
        inner = file.get(name)
        if not isinstance(inner, h5py.Group):
            continue
        # With few outermost groups, the groups below give a better fraction.
        children = [key for key in inner if isinstance(inner.get(key), h5py.Group)] if len(top) < 8 else []
        if not children:
            for group in walk(inner):
                yield group, (number + 1) / len(top)
            continue
        for place, child in enumerate(children):
            for group in walk(inner[child]):
                yield group, (number + (place + 1) / len(children)) / len(top)


def _frames(group: Any, path: Path, fraction: float, names: dict[str, str], maker: FrameMaker) -> Iterator[UnreadFrame]:
    name = group.name.strip("/")
    positions = group[names["positions"]]
    if positions.ndim not in (2, 3):
        raise SourceError(f"{path}: '{positions.name}' has shape {positions.shape}, not ([frames,] atoms, 3).")
    info = {f"group{depth}": part for depth, part in enumerate(name.split("/"))}
    several = positions.ndim == 3
    columns: dict[str, Any] = {}

    def read(number: int, source_id: str) -> Frame:
        if not columns:
            parts = {part: key for part, key in names.items() if key in group}
            columns.update({part: np.asarray(group[key]) for part, key in parts.items()})
        rows = {
            part: _row(column, part, number, len(positions) if several else None) for part, column in columns.items()
        }
        labels = {label: _unless_nan(rows[label]) for label in LABELS if label in rows}
        cell = np.reshape(rows.get("cell", np.zeros((3, 3))), (3, 3))
        raw = RawFrame(
            numbers=columns["numbers"] if columns["numbers"].ndim == 1 else rows["numbers"],
            positions=rows["positions"],
            cell=cell,
            pbc=rows.get("pbc", cell.any(axis=1)),
            **labels,
            other=rows,
        )
        return maker.make(raw, source_id, info)

    for number in range(len(positions) if several else 1):
        source_id = f"{path.name}#{name}/{number}" if several else f"{path.name}#{name}"
        yield UnreadFrame(source_id=source_id, read=partial(read, number, source_id), fraction=fraction)


def _row(column: Any, part: str, number: int, frames: int | None) -> Any:
    """Return the part of a column that belongs to one frame: its own row if there is one per frame."""
    if frames is not None and part != "numbers" and column.ndim and len(column) == frames:
        return column[number]
    if column.ndim == 2 and part not in PER_ATOM and len(column) == 1:
        return column[0]
    return column


def _unless_nan(value: Any) -> Any:
    return None if np.issubdtype(np.asarray(value).dtype, np.floating) and np.isnan(value).all() else value
