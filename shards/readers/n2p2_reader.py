"""The format input.data of n2p2 and RuNNer; ASE parses each frame on its own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import ase.io
from ase import Atoms

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.ase_atoms import frame_from_atoms
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import READ_ERRORS, open_text, optional_module

TOTAL_CHARGE = "total_charge"
"""Field in which ASE keeps the number of the line 'charge'."""


@reader(further_suffixes=(".data",))
def read_n2p2(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames between 'begin' and 'end', in the units of the settings.

    The charge is that of the line 'charge', unless `fields.charge` names something else or is empty.
    The format itself has no units; Hartree and Bohr are usual. Raises SourceError if the file is truncated.
    """
    # Older versions of ASE lack it.
    units = optional_module("ase.io.runner.runneratoms", "ase>=3.29", f"{path}: reading the n2p2 format").Units
    if "charge" not in settings.fields.model_fields_set:
        settings = replace(settings, fields=settings.fields.model_copy(update={"charge": TOTAL_CHARGE}))
    maker = FrameMaker(settings)
    with open_text(path) as (file, fraction):
        try:
            for number, text in enumerate(_frame_texts(file, path)):
                source_id = f"{path.name}#{number}"
                read = partial(_parse, text, source_id, maker, units.ASE)
                yield UnreadFrame(source_id=source_id, read=read, fraction=fraction())
        except READ_ERRORS as error:
            raise SourceError(f"{path} cannot be read to its end ({brief(error)}); copy it again.") from error


def _frame_texts(file: TextIO, path: Path) -> Iterator[str]:
    number, lines = 0, list[str]()
    for line in file:
        word = line.split(maxsplit=1)[0].lower() if line.strip() else ""
        if word == "begin" and lines:
            break
        if word == "begin" or lines:
            # ASE looks for the word in small letters at the very start of a frame.
            lines.append("begin" + line.strip()[5:] + "\n" if word == "begin" else _without_begin(line))
        if word == "end" and lines:
            yield "".join(lines)
            number, lines = number + 1, []
    if lines:
        raise SourceError(
            f"{path}, frame {number}: there is no 'end' after its 'begin'; the file is truncated or damaged."
        )


def _without_begin(line: str) -> str:
    """Return a line inside of a frame, such as a comment, without the word 'begin', with which ASE starts a frame."""
    return line.replace("begin", "")


def _parse(text: str, source_id: str, maker: FrameMaker, no_conversion: Any) -> Frame:
    try:
        # With its own units as those of the file, ASE leaves all numbers unchanged.
        read: Any = ase.io.read(io.StringIO(text), format="runnerdata", parallel=False, input_units=no_conversion)
    except Exception as error:  # depends on the damage: KeyError, ValueError, IndexError, ...
        fault = StructureError("unreadable", f"its lines cannot be parsed ({brief(error)})")
        return Frame(source_id=source_id, error=fault)
    return frame_from_atoms(cast(Atoms, read), source_id, maker)
