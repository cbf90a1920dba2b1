"""Everything that ASE reads: files of any of its formats, extended XYZ with any field names, databases."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import ase.db
import ase.io
from ase import Atoms

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings


def read_ase(path: Path, settings: ReadSettings) -> Iterator[Frame]:
    """Read any file that `ase.io.iread` reads; raises SourceError naming the frame where it breaks off."""
    maker = FrameMaker(settings)
    number = 0
    try:
        images: Iterator[Any] = ase.io.iread(str(path), index=":", do_not_split_by_at_sign=True)
        for atoms in images:
            yield frame_from_atoms(atoms, f"{path.name}#{number}", maker)
            number += 1
    except Exception as error:  # ASE's readers raise whatever they stumble on
        raise SourceError(f"{path}, frame {number}, cannot be read by ASE ({_brief(error)}).") from error


def read_extxyz(path: Path, settings: ReadSettings) -> Iterator[Frame]:
    """Read extended XYZ, each frame on its own, so that one that cannot be parsed does not end the file."""
    maker = FrameMaker(settings)
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(_frame_texts(file, path)):
                source_id = f"{path.name}#{number}"
                try:
                    atoms = cast(Atoms, ase.io.read(io.StringIO(text), format="extxyz"))
                except KeyError as error:
                    fault = StructureError("unknown_element", f"{error} is no chemical element")
                    yield Frame(source_id=source_id, error=fault)
                except Exception as error:  # ASE raises ValueError, XYZError, IndexError, ... for broken lines
                    yield Frame(source_id=source_id, error=StructureError("unreadable", _brief(error)))
                else:
                    yield frame_from_atoms(atoms, source_id, maker)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({_brief(error)}).") from error


def _frame_texts(file: Any, path: Path) -> Iterator[str]:
    """Split extended XYZ into frames; raises SourceError where a count is no number or lines are missing."""
    number = 0
    while line := file.readline():
        if not line.strip():
            continue
        try:
            count = int(line)
        except ValueError:
            count = -1
        if count < 0:
            raise SourceError(f"{path}, frame {number}: '{line.strip()[:40]}' is not a number of atoms.")
        # A damaged count may be beyond any file, and beyond what islice takes.
        lines = list(islice(file, min(count + 1, sys.maxsize)))
        if len(lines) < count + 1:
            raise SourceError(f"{path}, frame {number}: the file ends before {count} atoms are read; it is truncated.")
        yield line + "".join(lines)
        number += 1


def read_database(path: Path, settings: ReadSettings) -> Iterator[Frame]:
    """Read an ASE database; labels from its calculator results, key-value pairs or data."""
    maker = FrameMaker(settings)
    number = 0
    try:
        with ase.db.connect(str(path)) as database:
            for row in database.select():
                atoms = row.toatoms(add_additional_information=True)
                extra = {**atoms.info.pop("key_value_pairs", {}), **atoms.info.pop("data", {})}
                atoms.info.update(extra)
                yield frame_from_atoms(atoms, f"{path.name}#{row.id}", maker)
                number += 1
    except Exception as error:  # sqlite3.DatabaseError, json errors, KeyError, by the kind of damage
        raise SourceError(f"{path}, row {number}, cannot be read as an ASE database ({_brief(error)}).") from error


def frame_from_atoms(atoms: Atoms, source_id: str, maker: FrameMaker) -> Frame:
    """Turn ASE atoms into a frame; labels come from the calculator's stored results, `info` or `arrays`."""
    # Stored results are read as they are: get_forces() would zero the forces on fixed atoms.
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
    )
    return maker.make(raw, source_id, atoms.info)


def _brief(error: Exception) -> str:
    """First line of an error's text, or its kind."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
