"""Text files of extended XYZ, compressed or not, with any field names."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO, cast

import ase.io
from ase import Atoms

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.ase_atoms import frame_from_atoms
from hydrazero.shards.readers.extxyz.header import Header
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import READ_ERRORS, open_text
from hydrazero.shards.text.foreign_text import excerpt


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
    header, lines = Header(), text.split("\n")
    try:
        info = header(lines[1].strip())
        _check_columns(lines[2:], header.columns)
        read = ase.io.read(io.StringIO(text), format="extxyz", parallel=False, properties_parser=lambda _: info)
        atoms = cast(Atoms, read)
    except StructureError as error:
        return Frame(source_id=source_id, error=error)
    except KeyError as error:
        return Frame(source_id=source_id, error=StructureError("unknown_element", f"{error} is no chemical element"))
    except Exception as error:  # ASE raises ValueError, XYZError, IndexError, ... for broken lines
        return Frame(source_id=source_id, error=StructureError("unreadable", _with_atom(brief(error), lines[2:])))
    if header.stress is not None:
        atoms.info["stress"] = header.stress
    return frame_from_atoms(atoms, source_id, maker)


def _check_columns(lines: list[str], columns: int | None) -> None:
    """Raise StructureError if the line of an atom has more words than the Properties name: ASE would drop the rest."""
    for number, line in enumerate(lines if columns is not None else ()):
        words = len(line.split())
        if words not in (columns, 0):
            counts = f"{words} word{'s' * (words != 1)}, but the Properties name {columns} column{'s' * (columns != 1)}"
            hint = "; perhaps the number of atoms in the first line is too large" if line.strip().isdecimal() else ""
            raise StructureError("columns", f"the line of atom {number} has {counts}{hint}")


def _with_atom(reason: str, lines: list[str]) -> str:
    """Return a reason with the atom whose line holds the word in quotation marks at its beginning, if there is one."""
    word = reason.split("'")[1] if reason.startswith("'") else ""
    for number, line in enumerate(lines if word else ()):
        if word in line.split():
            return f"in the line of atom {number}, {reason}"
    return reason


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
            hint = f"; perhaps that of frame {number - 1} is wrong" if number else ""
            raise SourceError(f"{where}, frame {number}: '{excerpt(line.strip())}' is not a number of atoms{hint}.")
        # A damaged count may be beyond any file, and beyond what islice takes.
        lines = list(islice(file, min(count + 1, sys.maxsize)))
        if len(lines) < count + 1:
            raise SourceError(f"{where}, frame {number}: the file ends before {count} atoms are read; it is truncated.")
        yield line + "".join(lines)
        number += 1
