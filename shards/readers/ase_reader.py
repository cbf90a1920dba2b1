"""Formats that ASE reads: its own file formats, and databases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase.io.formats import filetype

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.ase_atoms import frame_from_atoms
from hydrazero.shards.readers.extxyz.text import read_extxyz
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.parts.stated_units import schnetpack_units, with_stated_units

XYZ = ("xyz", "extxyz")
"""Names that ASE gives to files of XYZ."""


@reader(suffixes=(".traj",))
def read_ase(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of any file that `ase.io.iread` reads; raise SourceError with the frame that cannot be read."""
    maker = FrameMaker(settings)
    number = 0
    try:
        if filetype(str(path)) in XYZ:
            yield from read_extxyz(path, settings)  # ASE's own reader loses cells, and fields in other spellings
            return
        # Not parallel: under mpirun ASE would wait for all ranks to read this file together.
        images: Iterator[Any] = ase.io.iread(str(path), index=":", parallel=False, do_not_split_by_at_sign=True)
        for atoms in images:
            source_id = f"{path.name}#{number}"
            # ASE does not say what fraction of the file has been read.
            yield UnreadFrame(
                source_id=source_id, read=partial(frame_from_atoms, atoms, source_id, maker), fraction=0.0
            )
            number += 1
    except SourceError:
        raise
    except Exception as error:  # ASE's readers raise errors of many kinds
        raise SourceError(f"{path}, frame {number}, cannot be read by ASE ({brief(error)}).") from error


@reader(suffixes=(".db",))
def read_database(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the rows of an ASE database; labels are calculator results, key-value pairs or data.

    The units in the metadata of databases made by SchNetPack are used. Raises SourceError for a damaged file, and if
    the settings contradict the units.
    """
    number = 0
    try:
        with ase.db.connect(str(path), serial=True) as database:
            rows = max(database.count(), 1)
            metadata = database.metadata
            stated = schnetpack_units(metadata if isinstance(metadata, dict) else {}, settings)
            maker = FrameMaker(with_stated_units(settings, stated, path))
            for row in database.select():
                number += 1
                source_id = f"{path.name}#{row.id}"
                read = partial(frame_from_row, row, source_id, maker)
                yield UnreadFrame(source_id=source_id, read=read, fraction=number / rows)
    except SourceError:
        raise
    except Exception as error:  # depends on the damage: sqlite3.DatabaseError, json errors, KeyError
        raise SourceError(f"{path}, row {number}, cannot be read as an ASE database ({brief(error)}).") from error


DATABASE_LABELS = {"total_charge": "charge", "spin_multiplicity": "multiplicity"}
"""Name that databases use for a label -> the label."""


def frame_from_row(row: Any, source_id: str, maker: FrameMaker, own: Mapping[str, str] = DATABASE_LABELS) -> Frame:
    """Return the frame of a row of an ASE database; its key-value pairs and data become fields of the frame.

    `own` are the names that databases use for labels. They count where the settings name no field and the usual one is
    absent.
    """
    try:
        atoms = row.toatoms(add_additional_information=True)
        for key in ("key_value_pairs", "data"):
            atoms.info.update(atoms.info.pop(key, {}))
    except Exception as error:  # ASE raises errors of many kinds for a damaged row
        return Frame(source_id=source_id, error=StructureError("unreadable", brief(error)))
    for name, label in own.items():
        if name in atoms.info and label not in {*atoms.info, *maker.settings.fields.model_fields_set}:
            value = atoms.info[name]
            # fairchem writes a spin of 0 where the multiplicity is not known.
            unknown = name == "spin" and isinstance(value, int | float | np.number) and value == 0
            atoms.info[label] = None if unknown else value
    return frame_from_atoms(atoms, source_id, maker)
