"""HDF5 files of ragged arrays: the atoms of all structures in one array, with offsets or lengths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.conditions import condition_named
from hydrazero.shards.errors import HydrazeroError, SourceError, StructureError
from hydrazero.shards.readers.column_names import LABELS, listed
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.parts.frame_parts import frame_of_parts, names_in, unread_conditions
from hydrazero.shards.readers.parts.own_items import OwnItems, open_hdf5
from hydrazero.shards.readers.parts.shared import check_one_cell, part_shapes
from hydrazero.shards.readers.parts.stated_units import (
    attributes_of,
    unit_of_array,
    units_by_key,
    with_stated_units,
)

BLOCK = 256
"""Number of structures that are read at once."""

H5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)
"""Errors that h5py raises for damaged files."""

PER_ATOM = ("numbers", "positions", "forces")
SHARED = ("cell", "pbc", "charge", "multiplicity")
"""Parts of which one value may hold for all structures."""


@reader(suffixes=(".h5", ".hdf5"))
def read_hdf5(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the structures of ragged arrays: numbers [all atoms] (or symbols), positions [all atoms, 3], ...

    'ptr' [structures + 1] is the first atom of each structure, or 'n_atoms' [structures] its number of atoms. Without
    a pbc, a structure is periodic along the cell vectors that are not zero. A cell, pbc, charge or multiplicity with
    the shape of one structure holds for all. Units in attributes of datasets ('units') and of the file ('energy_unit')
    are used. Raises SourceError if a dataset is missing, has a wrong length, or cannot be read, or if the settings
    contradict the units.
    """
    h5py, file = open_hdf5(path)
    with file:
        try:
            source = RaggedArrays(path, OwnItems(h5py, file, path), settings, h5py.Dataset)
        except HydrazeroError:
            raise
        except H5_ERRORS as error:
            raise SourceError(f"{path} is damaged ({brief(error)}); copy it again.") from error
        settings = with_stated_units(settings, source.stated, path, source.parts)
        yield from source.frames(FrameMaker(settings))


class RaggedArrays:
    """The arrays of one HDF5 or npz file."""

    def __init__(self, path: Path, file: Any, settings: ReadSettings, dataset: type) -> None:
        self._path = path
        names = names_in(settings, file)
        # Parts with a row for each atom, not for each structure.
        self.per_atom = {*PER_ATOM, *(target.field for target in settings.targets.values() if target.of == "atom")}
        asked = {*settings.columns, "numbers", "positions"}
        known = {part: file[name] for part, name in names.items() if isinstance(file.get(name), dataset)}
        known = {part: item for part, item in known.items() if item.shape is not None}  # others are empty
        missing = [f"{part} ('{names[part]}')" for part in asked if part not in known]
        if missing:
            there = listed(name for name, item in file.items() if isinstance(item, dataset))
            advice = "name the datasets under [columns]"
            if not there and len(file):
                there = f"only groups ({listed(file, 3)})"
                advice = "use --format hdf5_groups, and name the datasets of the groups under [columns]"
            there = there or "nothing"
            raise SourceError(f"{path} lacks {', '.join(sorted(missing))}; it holds {there}: {advice}.")
        lengths = (part for part in ("ptr", "n_atoms") if part in known or isinstance(file.get(part), dataset))
        self._lengths = next(lengths, "")
        if not self._lengths:
            raise SourceError(f"{path} has neither 'ptr' nor 'n_atoms'; name one of them under [columns].")
        self._sizes = known.pop(self._lengths) if self._lengths in known else file[self._lengths]
        if len(self._sizes.shape) != 1 or self._sizes.dtype.kind not in "iu":
            raise SourceError(
                f"{path}: '{self._lengths}' has shape {self._sizes.shape} and the type {self._sizes.dtype}; it must be "
                "a list of integers."
            )
        self._count = len(self._sizes) - (self._lengths == "ptr")
        attributes = attributes_of(file)
        by_column = {part: unit_of_array(column, f"'{names[part]}'") for part, column in known.items()}
        self.stated = units_by_key(attributes, "attribute") | {part: unit for part, unit in by_column.items() if unit}
        """Part -> unit that the file states for it."""
        self._shared = {part: known.pop(part)[()] for part in SHARED if part in known and self._is_shared(part, known)}
        if "pbc" in attributes and "pbc" not in {*known, *self._shared}:
            self._shared["pbc"] = attributes["pbc"]
        self._columns, self._names = known, names
        self._check_lengths()
        arrays = {name: item for name in file if condition_named(name) and isinstance(item := file.get(name), dataset)}
        self.unread = unread_conditions(arrays, set(names.values()), self._count)
        """What looks like a charge or a spin and is not read, for each structure."""

    @property
    def parts(self) -> set[str]:
        """The parts that the file holds."""
        return set(self._columns) | set(self._shared)

    def _is_shared(self, part: str, columns: dict[str, Any]) -> bool:
        # The number of axes decides, not the length: three flags are the pbc of all, even of three structures.
        shape = columns[part].shape
        if part == "cell" and shape == (3, 3) and self._count == 3:
            try:
                check_one_cell(columns[part][()], part)
            except StructureError as error:
                raise SourceError(f"{self._path}: {error}.") from error
        return shape in part_shapes(part, 0) and (part in ("cell", "pbc") or shape == ())

    def _check_lengths(self) -> None:
        positions = self._columns["positions"].shape
        if not positions:
            raise SourceError(f"{self._path}: '{self._names['positions']}' has shape {positions}, not (all atoms, 3).")
        for part, column in self._columns.items():
            wanted = positions[0] if part in self.per_atom else self._count
            if not column.shape or len(column) != wanted:
                raise SourceError(
                    f"{self._path}: '{self._names[part]}' has shape {column.shape}, not {wanted} rows as "
                    f"'{self._lengths}' and the positions say."
                )
            if part in ("cell", "pbc") and column.shape[1:] not in part_shapes(part, 0):
                usual = (3, 3) if part == "cell" else (3,)
                raise SourceError(
                    f"{self._path}: '{self._names[part]}' has shape {column.shape}, not {('structures', *usual)}."
                )

    def frames(self, maker: FrameMaker) -> Iterator[UnreadFrame]:
        """Yield all structures; the arrays of a block are read together with its first frame."""
        first_atom, atoms = 0, len(self._columns["positions"])
        for first in range(0, self._count, BLOCK):
            starts = self._starts(first, min(first + BLOCK, self._count), first_atom)
            if (np.diff(starts) < 0).any() or starts[0] != first_atom or starts[-1] > atoms:
                raise SourceError(
                    f"{self._path}: '{self._lengths}' is damaged between structures {first} and "
                    f"{first + len(starts) - 2}: atoms {starts.min()} to {starts.max()} of {atoms}."
                )
            first_atom = int(starts[-1])
            block = _Block(self, first, starts)
            for row in range(len(starts) - 1):
                source_id = f"{self._path.name}#{first + row}"
                read = partial(block.frame, row, source_id, maker)
                yield UnreadFrame(source_id=source_id, read=read, fraction=(first + row + 1) / self._count)
        if first_atom != atoms:
            raise SourceError(f"{self._path}: '{self._lengths}' ends at atom {first_atom} of {atoms}.")

    def _starts(self, first: int, last: int, first_atom: int) -> NDArray[np.int64]:
        """Return the first atom of each structure, and the atom after the last one."""
        if self._lengths == "ptr":
            return self.slice(self._sizes, first, last + 1).astype(np.int64)
        sizes = self.slice(self._sizes, first, last).astype(np.int64)
        return first_atom + np.concatenate([[0], np.cumsum(sizes)])

    def slice(self, column: Any, first: int, last: int) -> NDArray[Any]:
        """Rows of a dataset; raises SourceError where the file is damaged."""
        try:
            return np.asarray(column[first:last])
        except H5_ERRORS as error:
            raise SourceError(
                f"{self._path}: '{getattr(column, 'name', 'an array')}' cannot be read ({brief(error)}); copy it again."
            ) from error

    def block(self, first: int, starts: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return all columns of some structures."""
        atoms, rows = (int(starts[0]), int(starts[-1])), (first, first + len(starts) - 1)
        return {
            part: self.slice(column, *(atoms if part in self.per_atom else rows))
            for part, column in self._columns.items()
        }

    @property
    def shared(self) -> dict[str, Any]:
        """The parts of which one value holds for all structures."""
        return self._shared


class _Block:
    """Consecutive structures, which are read together as soon as one of them is needed."""

    def __init__(self, source: RaggedArrays, first: int, starts: NDArray[np.int64]) -> None:
        self._source, self._first, self._starts = source, first, starts
        self._columns: dict[str, NDArray[Any]] = {}

    def frame(self, row: int, source_id: str, maker: FrameMaker) -> Frame:
        """Return the frame of a row."""
        self._columns = self._columns or self._source.block(self._first, self._starts)
        begin, end = self._starts[row : row + 2] - self._starts[0]
        parts: dict[str, Any] = {
            part: column[begin:end] if part in self._source.per_atom else plain(column[row])
            for part, column in self._columns.items()
        }
        structural = {*LABELS, "numbers", "positions", "cell", "pbc"}
        info = {part: value for part, value in parts.items() if part not in structural}
        info |= {name: values[self._first + row] for name, values in self._source.unread.items()}
        return frame_of_parts({**self._source.shared, **parts}, source_id, maker, info=info)


def plain(value: Any) -> Any:
    """Return bytes as a text, and single values of NumPy as those of Python."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value
