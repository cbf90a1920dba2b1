"""XSF files of aenet and XCrySDen: crystals, slabs and molecules, with the energy in a comment."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ase import Atoms, units
from ase.io.xsf import iread_xsf

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.ase_atoms import frame_from_atoms
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import READ_ERRORS, open_text
from hydrazero.shards.readers.parts.stated_units import StatedUnit, with_stated_units

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][-+]?\d+)?"
ENERGY = re.compile(rf"^\s*#\s*total\s+energy\s*[=:]\s*({NUMBER})\s*(\S*)", re.IGNORECASE)
"""The comment in which aenet expects the energy, with its unit or without one."""


@reader(suffixes=(".xsf",))
def read_xsf(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the structure of an XSF file, or those of one with several steps.

    The energy is that of the comment '# total energy = X eV', by which aenet's files are known. Their forces have the
    unit of that energy over Å; those of all other XSF files are in Hartree/Å. Raises SourceError if the file cannot be
    read, or where the settings contradict the units of the file.
    """
    with open_text(path) as (file, _):
        try:
            text = file.read()
        except READ_ERRORS as error:
            raise SourceError(f"{path} cannot be read to its end ({brief(error)}); copy it again.") from error
    found = [match for line in text.splitlines() if (match := ENERGY.match(line))]
    maker = FrameMaker(with_stated_units(settings, _units(found, path), path))
    number = 0
    try:
        for number, atoms in enumerate(iread_xsf(io.StringIO(text))):
            source_id = f"{path.name}#{number}"
            energy = float(re.sub("[dD]", "e", found[number][1])) if number < len(found) else None
            read = partial(_frame, atoms, energy, source_id, maker, settings)
            yield UnreadFrame(source_id=source_id, read=read, fraction=1.0)
    except SourceError:
        raise
    except Exception as error:  # ASE's reader raises errors of many kinds
        raise SourceError(f"{path}, frame {number}, is not in the XSF format ({brief(error)}).") from error


def _units(found: list[re.Match[str]], path: Path) -> dict[str, StatedUnit]:
    if not found:
        return {"forces": StatedUnit(unit="Hartree/Angstrom", where="as the XSF format demands")}
    unit = found[0][2]
    if any(match[2] != unit for match in found):
        raise SourceError(f"{path} names several units of the energy; write each structure into a file of its own.")
    if not unit:
        return {}  # the settings say which it is, eV by default
    where = f"comment '{found[0][0].strip()}'"
    return {
        "energy": StatedUnit(unit=unit, where=where),
        "forces": StatedUnit(unit=f"{unit}/Angstrom", where=where),
    }


def _frame(atoms: Atoms, energy: float | None, source_id: str, maker: FrameMaker, settings: ReadSettings) -> Frame:
    calculator = atoms.calc
    atoms.calc = None
    if calculator is not None and settings.fields.forces:
        # ASE has converted the forces from Hartree/Å.
        atoms.arrays[settings.fields.forces] = calculator.results["forces"] / units.Hartree
    if energy is not None and settings.fields.energy:
        atoms.info[settings.fields.energy] = energy
    if not len(atoms):
        return Frame(source_id=source_id, error=StructureError("unreadable", "the file holds no atoms"))
    return frame_from_atoms(atoms, source_id, maker)
