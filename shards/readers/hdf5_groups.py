"""HDF5 files with a group for each molecule, reaction or conformer, such as ANI-1x, QM7-X and Transition1x."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hydrazero.shards.errors import HydrazeroError, SourceError, StructureError
from hydrazero.shards.readers.column_names import column_names
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.hdf5_reader import H5_ERRORS, plain
from hydrazero.shards.readers.parts.frame_parts import frame_of_parts, names_in, unread_conditions
from hydrazero.shards.readers.parts.own_items import OwnItems, open_hdf5
from hydrazero.shards.readers.parts.shared import shared_parts
from hydrazero.shards.readers.parts.stated_units import attributes_of, unit_of_array, units_by_key, with_stated_units


@reader(further_suffixes=(".h5", ".hdf5", ".xz"))  # QM7-X packs its files as '1000.xz'
def read_hdf5_groups(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of every group with numbers [atoms] and positions, [atoms, 3] or [frames, atoms, 3].

    The names of the groups around a frame become its fields 'group0' (the outermost), 'group1', ...; a group that
    several links reach is read once. In a group of several frames, an array with the shape of one frame (a cell, a pbc,
    a charge) holds for all. A label that is NaN counts as absent. Units in attributes of datasets ('units') are used.
    Raises SourceError if the file is damaged, is not HDF5, or has no such group, or if the settings contradict its
    units.
    """
    names, found = column_names(settings), False
    h5py, file = open_hdf5(path)
    with file:
        try:
            wanted = (names["numbers"], names["positions"])
            for items, fraction in _groups(OwnItems(h5py, file, path), wanted):
                found = True
                yield from _frames(items, path, fraction, settings)
        except HydrazeroError:
            raise
        except H5_ERRORS as error:
            raise SourceError(f"{path} is damaged ({brief(error)}); copy it again.") from error
    if not found:
        raise SourceError(
            f"{path} has no group with '{names['numbers']}' and '{names['positions']}', so its layout is another one; "
            "name the datasets under [columns]."
        )


def _groups(file: OwnItems, wanted: tuple[str, str]) -> Iterator[tuple[OwnItems, float]]:
    """Yield groups that have the wanted datasets, with the fraction of the outermost groups up to their end."""
    seen: set[Any] = set()

    def walk(group: OwnItems) -> Iterator[OwnItems]:
        if group.address in seen:
            return
        seen.add(group.address)
        if all(group.dataset(name) is not None for name in wanted):
            yield group
        for name in group:
            inner = group.below(name)  # None for a link that leads to nothing
            if inner is not None:
                yield from walk(inner)

    top = list(file)
    if all(file.dataset(name) is not None for name in wanted):
        yield file, 1.0
    for number, name in enumerate(top):
        inner = file.below(name)
        if inner is None:
            continue
        # With few outermost groups, the groups below give a better fraction.
        children = [below for key in inner if (below := inner.below(key)) is not None] if len(top) < 8 else []
        if not children:
            for group in walk(inner):
                yield group, (number + 1) / len(top)
            continue
        for place, child in enumerate(children):
            for group in walk(child):
                yield group, (number + (place + 1) / len(children)) / len(top)


def _frames(items: OwnItems, path: Path, fraction: float, settings: ReadSettings) -> Iterator[UnreadFrame]:
    name = items.group.name.strip("/")
    names = names_in(settings, {*items, *attributes_of(items.group)})
    shape: tuple[int, ...] = items[names["positions"]].shape or ()
    several = len(shape) == 3
    info = {f"group{depth}": part for depth, part in enumerate(name.split("/"))}
    reader_of_group: list[_Group] = []

    def read(number: int, source_id: str) -> Frame:
        try:
            if not reader_of_group:
                reader_of_group.append(_Group(items, path, names, settings))
            return reader_of_group[0].frame(number, source_id, info)
        except StructureError as error:
            return Frame(source_id=source_id, error=error, info=info)

    for number in range(shape[0] if several else 1):
        source_id = f"{path.name}#{name}/{number}" if several else f"{path.name}#{name}"
        yield UnreadFrame(source_id=source_id, read=partial(read, number, source_id), fraction=fraction)


class _Group:
    """The arrays of a group, read as soon as one of its frames is needed."""

    def __init__(self, items: OwnItems, path: Path, names: dict[str, str], settings: ReadSettings) -> None:
        group = items.group
        found = {part: items.dataset(key) for part, key in names.items()}
        # A dataset without a shape is empty, and stands for no value.
        datasets = {
            part: dataset for part, dataset in found.items() if dataset is not None and dataset.shape is not None
        }
        try:
            self._columns: dict[str, Any] = {part: dataset[()] for part, dataset in datasets.items()}
        except H5_ERRORS as error:
            raise StructureError("unreadable", f"the group '{group.name}' cannot be read ({brief(error)})") from error
        attributes = attributes_of(group)
        for label in ("charge", "multiplicity"):
            if label not in self._columns and names.get(label) in attributes:
                self._columns[label] = attributes[names[label]]
        # What holds for the file holds for the group, unless the group or the array says something else.
        stated = units_by_key(attributes_of(group.file), "attribute of the file")
        stated |= units_by_key(attributes, f"attribute of '{group.name}'")
        units = {part: unit_of_array(dataset, f"'{dataset.name}'") for part, dataset in datasets.items()}
        stated |= {part: unit for part, unit in units.items() if unit is not None}
        self._maker = FrameMaker(with_stated_units(settings, stated, path, datasets))
        shape: tuple[int, ...] = np.shape(self._columns.get("positions", ()))
        if len(shape) not in (2, 3):
            raise StructureError(
                "positions_shape", f"'{names['positions']}' has shape {shape}, not ([frames,] atoms, 3)"
            )
        self._shared = frozenset(self._columns)
        if len(shape) == 3:
            targets = {target.field: target for target in settings.targets.values()}
            self._shared = shared_parts(self._columns, names, shape[0], shape[1], targets)
        read, frames = set(names.values()), shape[0] if len(shape) == 3 else 1
        try:
            self._unread = {**unread_conditions(attributes, read, frames), **unread_conditions(items, read, frames)}
        except HydrazeroError:
            raise
        except H5_ERRORS:  # a damaged dataset, or a link that leads to nothing; all they serve for is a warning
            self._unread = {}

    def frame(self, number: int, source_id: str, info: dict[str, str]) -> Frame:
        """Return the frame of a row."""
        parts = {part: column if part in self._shared else column[number] for part, column in self._columns.items()}
        fields = {part: plain(value) for part, value in parts.items() if np.ndim(value) == 0}
        fields |= {name: values[number] for name, values in self._unread.items()}
        return frame_of_parts(parts, source_id, self._maker, info={**fields, **info}, other=parts)
