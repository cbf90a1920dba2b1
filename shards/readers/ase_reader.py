"""Formats that ASE reads: its own file formats, extended XYZ with any field names, and databases."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import ase.db
import ase.io
from ase import Atoms

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import READ_ERRORS, open_text


@reader(suffixes=(".traj",))
def read_ase(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of any file that `ase.io.iread` reads; raise SourceError with the frame that cannot be read."""
    maker = FrameMaker(settings)
    number = 0
    try:
        # Not parallel: under mpirun ASE would wait for all ranks to read this file together.
        images: Iterator[Any] = ase.io.iread(str(path), index=":", parallel=False, do_not_split_by_at_sign=True)
        for atoms in images:
            source_id = f"{path.name}#{number}"
            # ASE does not say what fraction of the file has been read.
            yield UnreadFrame(
                source_id=source_id, read=partial(frame_from_atoms, atoms, source_id, maker), fraction=0.0
            )
            number += 1
    except Exception as error:  # ASE's readers raise errors of many kinds
        raise SourceError(f"{path}, frame {number}, cannot be read by ASE ({brief(error)}).") from error


@reader(suffixes=(".xyz", ".extxyz"))
def read_extxyz(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of extended XYZ, compressed or not; each is parsed alone, so that bad ones can be skipped."""
    with open_text(path) as (file, fraction):
        yield from extxyz_frames(file, path.name, str(path), fraction, FrameMaker(settings))


def extxyz_frames(
    file: TextIO, name: str, where: str, fraction: Callable[[], float], maker: FrameMaker
) -> Iterator[UnreadFrame]:
    """Yield the frames 'NAME#0', ... of a text; raise SourceError, naming `where`, if it is truncated or not XYZ."""
    try:
        for number, text in enumerate(_frame_texts(file, where)):
            source_id = f"{name}#{number}"
            read = partial(_parse_extxyz, text, source_id, maker)
            yield UnreadFrame(source_id=source_id, read=read, fraction=fraction())
    except READ_ERRORS as error:
        raise SourceError(f"{where} cannot be read to its end ({brief(error)}); copy it again.") from error


def _parse_extxyz(text: str, source_id: str, maker: FrameMaker) -> Frame:
    try:
        atoms = cast(Atoms, ase.io.read(io.StringIO(text), format="extxyz", parallel=False))
    except KeyError as error:
        return Frame(source_id=source_id, error=StructureError("unknown_element", f"{error} is no chemical element"))
    except Exception as error:  # ASE raises ValueError, XYZError, IndexError, ... for broken lines
        return Frame(source_id=source_id, error=StructureError("unreadable", brief(error)))
    return frame_from_atoms(atoms, source_id, maker)


def _frame_texts(file: TextIO, where: str) -> Iterator[str]:
    """Yield the text of each frame; raise SourceError if a number of atoms is wrong, or lines are missing."""
    number = 0
    while line := file.readline():
        if not line.strip():
            continue
        try:
            count = int(line)
        except ValueError:
            count = -1
        if count < 0:
            raise SourceError(f"{where}, frame {number}: '{line.strip()[:40]}' is not a number of atoms.")
        # A damaged count may be beyond any file, and beyond what islice takes.
        lines = list(islice(file, min(count + 1, sys.maxsize)))
        if len(lines) < count + 1:
            raise SourceError(f"{where}, frame {number}: the file ends before {count} atoms are read; it is truncated.")
        yield line + "".join(lines)
        number += 1


@reader(suffixes=(".db",))
def read_database(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the rows of an ASE database; labels are calculator results, key-value pairs or data."""
    maker = FrameMaker(settings)
    number = 0
    try:
        with ase.db.connect(str(path), serial=True) as database:
            rows = max(database.count(), 1)
            for row in database.select():
                number += 1
                source_id = f"{path.name}#{row.id}"
                read = partial(frame_from_row, row, source_id, maker)
                yield UnreadFrame(source_id=source_id, read=read, fraction=number / rows)
    except Exception as error:  # depends on the damage: sqlite3.DatabaseError, json errors, KeyError
        raise SourceError(f"{path}, row {number}, cannot be read as an ASE database ({brief(error)}).") from error


def frame_from_row(row: Any, source_id: str, maker: FrameMaker) -> Frame:
    """Return the frame of a row of an ASE database; its key-value pairs and data become fields of the frame."""
    try:
        atoms = row.toatoms(add_additional_information=True)
    except Exception as error:  # ASE raises errors of many kinds for a damaged row
        return Frame(source_id=source_id, error=StructureError("unreadable", brief(error)))
    extra = {**atoms.info.pop("key_value_pairs", {}), **atoms.info.pop("data", {})}
    atoms.info.update(extra)
    return frame_from_atoms(atoms, source_id, maker)


def frame_from_atoms(atoms: Atoms, source_id: str, maker: FrameMaker) -> Frame:
    """Return the frame of ASE atoms; labels come from stored results of the calculator, `info` or `arrays`."""
    # Stored results are used directly, since get_forces() would set the forces on fixed atoms to zero.
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    names = maker.settings.fields

    def label(name: str) -> Any:
        if not name:
            return None
        for place in (results, atoms.info, atoms.arrays):
            if name in place:
                return place[name]
        return None

    raw = RawFrame(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell[:],
        pbc=atoms.pbc,
        energy=label(names.energy),
        forces=label(names.forces),
        stress=label(names.stress),
        virial=label(names.virial),
        charge=label(names.charge),
        multiplicity=label(names.multiplicity),
        other={**atoms.arrays, **results},
    )
    return maker.make(raw, source_id, atoms.info)
