"""What readers share: settings, the frame that they yield, and the way from raw labels to a checked Structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.settings_parser import Section
from hydrazero.shards.structure import MAX_ATOMIC_NUMBER, Structure, check_structure
from hydrazero.shards.targets import TargetSection, target_value
from hydrazero.shards.units import energy_factor, force_factor, known_unit, length_factor, stress_factor

MAX_WHOLE = 32767
"""Largest charge and multiplicity; blocks hold them as int16."""

ASE_STRESS_ORDER = "xx yy zz yz xz xy"
"""In which ASE has the six numbers of a symmetric stress; VASP has xx yy zz xy yz xz."""


class FieldNames(Section):
    """Names under which the source holds the labels of a frame."""

    energy: str = "energy"
    """Field of the total energy."""
    forces: str = "forces"
    """Array of the forces."""
    stress: str = "stress"
    """Field of the stress."""
    virial: str = ""
    """Field of the virial, from which the stress is computed as -virial / volume if it is set; its unit is that of the
    energy."""
    charge: str = "charge"
    """Field of the total charge."""
    multiplicity: str = "multiplicity"
    """Field of the spin multiplicity."""


class SourceUnits(Section):
    """Units of the source; values are converted into Å, eV, eV/Å and eV/Å³."""

    length: Annotated[str, AfterValidator(known_unit(length_factor))] = "Angstrom"
    """Unit of positions and cells: 'Angstrom', 'Bohr' or 'nm'."""
    energy: Annotated[str, AfterValidator(known_unit(energy_factor))] = "eV"
    """Unit of energies: 'eV', 'meV', 'Hartree', 'Ry', 'kcal/mol' or 'kJ/mol'."""
    forces: Annotated[str, AfterValidator(known_unit(force_factor))] = "eV/Angstrom"
    """Unit of forces: a unit of energy over a unit of length, such as 'Hartree/Bohr'."""
    stress: Annotated[str, AfterValidator(known_unit(stress_factor))] = "eV/Angstrom^3"
    """Unit of the stress, with its sign: 'eV/Angstrom^3', 'GPa', 'kbar' or 'bar' if it is positive under tension, as in
    ASE; '-GPa', '-kbar' and so on if it is positive under compression, as in VASP."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How to read a source file."""

    format: str | None = None
    """Name of a reader; guessed from the file's suffix if None."""
    fields: FieldNames = field(default_factory=FieldNames)
    units: SourceUnits = field(default_factory=SourceUnits)
    columns: Mapping[str, str] = field(default_factory=dict)
    """Part of a structure -> where it is in the source: 'numbers', 'positions', 'cell', 'pbc', the labels, and for
    ragged arrays 'ptr' or 'n_atoms'; any further name becomes a field of the frame."""
    require: tuple[str, ...] = ()
    """Labels without which a frame is bad: of 'energy', 'forces', 'stress', 'charge', 'multiplicity'."""
    absent_if_zero: tuple[str, ...] = ()
    """Labels, of 'forces' and 'stress', that a source fills with zeros where it has none."""
    energy_per_atom: bool = False
    """Whether the source's energies are divided by the number of atoms."""
    stress_order: str = ASE_STRESS_ORDER
    """Order of six numbers of a stress or virial."""
    targets: Mapping[str, TargetSection] = field(default_factory=dict)
    """Further quantities, by the names that they get."""
    trust_pickle: bool = False
    """Whether sources of pickles may be loaded, which can run any code."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a source: a structure, or the reason why there is none."""

    source_id: str
    """'file#frame'."""
    structure: Structure | None = None
    error: StructureError | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    """The frame's other fields, for grouping and selection."""


@dataclass(frozen=True, kw_only=True)
class UnreadFrame:
    """A frame that a reader has come past but not read in full, so that several processes can share a source."""

    source_id: str
    read: Callable[[], Frame]
    """Reads it; valid until the reader is asked for the next frame."""
    fraction: float
    """Of the source that ends with this frame, 0 to 1; for the time left."""


ReadFunction = Callable[[Path, ReadSettings], Iterator[UnreadFrame]]
"""Walks through a source and yields its frames; raises SourceError if the source as a whole cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A format of sources: the function that reads one of them, and how they are recognised."""

    function: ReadFunction
    suffixes: tuple[str, ...] = ()
    """Suffixes, in small letters such as '.xyz', of files that are in this format unless the user names another."""
    further_suffixes: tuple[str, ...] = ()
    """Suffixes of files that are taken from a folder only if the user names this format."""
    marker: str = ""
    """Name of a file that each source holds, if sources of this format are folders."""

    def __call__(self, path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
        """Walk through a source, and yield its frames."""
        return self.function(path, settings)


def reader(
    *, suffixes: tuple[str, ...] = (), further_suffixes: tuple[str, ...] = (), marker: str = ""
) -> Callable[[ReadFunction], Reader]:
    """Return a decorator that makes a function `read_NAME(path, settings)` a Reader with the given values."""

    def decorated(function: ReadFunction) -> Reader:
        return Reader(function=function, suffixes=suffixes, further_suffixes=further_suffixes, marker=marker)

    return decorated


@dataclass(frozen=True, kw_only=True)
class RawFrame:
    """A frame in the source's units."""

    numbers: Any
    positions: Any
    cell: Any
    pbc: Any
    energy: Any = None
    forces: Any = None
    stress: Any = None
    """[3, 3], [9] or [6] in the order of the settings."""
    virial: Any = None
    charge: Any = None
    """Counts as 0 where it is None, unless it is required; likewise the multiplicity."""
    multiplicity: Any = None
    other: Mapping[str, Any] = field(default_factory=dict)
    """What else the source has of the frame, by its names there; targets are looked for in it and in the info."""


class FrameMaker:
    """Turns raw frames into frames: units, required labels, checks."""

    def __init__(self, settings: ReadSettings) -> None:
        self.settings = settings
        units = settings.units
        self._length, self._energy = length_factor(units.length), energy_factor(units.energy)
        self._forces, self._stress = force_factor(units.forces), stress_factor(units.stress)
        self._places = stress_places(settings.stress_order)

    def make(self, raw: RawFrame, source_id: str, info: Mapping[str, Any]) -> Frame:
        """Convert and check; a fault becomes the frame's error."""
        try:
            structure = self._structure(raw, source_id, info)
            check_structure(structure)
            self._check_required(raw, structure)
        except StructureError as error:
            return Frame(source_id=source_id, error=error, info=info)
        return Frame(source_id=source_id, structure=structure, info=info)

    def _structure(self, raw: RawFrame, source_id: str, info: Mapping[str, Any]) -> Structure:
        numbers = _atomic_numbers(raw.numbers)
        cell = self._length * _array(raw.cell, "cell")
        return Structure(
            numbers=numbers,
            positions=self._length * _array(raw.positions, "positions"),
            cell=cell,
            pbc=np.broadcast_to(np.asarray(raw.pbc, dtype=bool), (3,)).copy(),
            energy=self._energy_of(raw, len(numbers)),
            forces=None if raw.forces is None else self._unless_zero("forces", self._forces, raw.forces),
            stress=self._stress_of(raw, cell),
            charge=_whole(raw.charge, "charge"),
            multiplicity=_whole(raw.multiplicity, "multiplicity"),
            targets=self._targets("structure", raw, info, len(numbers)),
            atom_targets=self._targets("atom", raw, info, len(numbers)),
            source_id=source_id,
        )

    def _targets(self, of: str, raw: RawFrame, info: Mapping[str, Any], atoms: int) -> dict[str, np.ndarray]:
        found = {
            name: target_value(name, target, raw.other.get(target.field, info.get(target.field)), atoms)
            for name, target in self.settings.targets.items()
            if target.of == of
        }
        return {name: value for name, value in found.items() if value is not None}

    def _energy_of(self, raw: RawFrame, atoms: int) -> float | None:
        if raw.energy is None:
            return None
        energy = self._energy * _scalar(raw.energy, "energy")
        return energy * atoms if self.settings.energy_per_atom else energy

    def _stress_of(self, raw: RawFrame, cell: np.ndarray) -> np.ndarray | None:
        if raw.virial is not None:
            volume = abs(np.linalg.det(cell))
            if volume < 1e-6:
                raise StructureError("singular_cell", "a virial is given, but the cell has no volume")
            return -self._energy * self._matrix(raw.virial, "virial") / volume
        return (
            None
            if raw.stress is None
            else self._unless_zero("stress", self._stress, self._matrix(raw.stress, "stress"))
        )

    def _unless_zero(self, label: str, factor: float, value: Any) -> np.ndarray | None:
        values = factor * _array(value, label)
        return None if label in self.settings.absent_if_zero and not values.any() else values

    def _matrix(self, value: Any, name: str) -> np.ndarray:
        """Symmetric 3 x 3 matrix from [3, 3], [9] or [6]."""
        array = _array(value, name)
        if array.size == 9:
            matrix = array.reshape(3, 3)
            return 0.5 * (matrix + matrix.T)
        if array.shape == (6,):
            return array[self._places]
        raise StructureError(f"{name}_shape", f"the {name} has shape {array.shape}, not (3, 3), (9,) or (6,)")

    def _check_required(self, raw: RawFrame, structure: Structure) -> None:
        for label in self.settings.require:
            # A structure has a charge and a multiplicity whether its source says them or not.
            if label in self.settings.targets:
                held = {**structure.targets, **structure.atom_targets}.get(label)
                name = self.settings.targets[label].field
            else:
                held = getattr(raw if label in ("charge", "multiplicity") else structure, label)
                name = getattr(self.settings.fields, label)
            if held is None:
                raise StructureError(f"no_{label}", f"the frame has no {label} (field '{name}')")


def _array(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StructureError(f"{name}_shape", f"the {name} cannot be read as numbers ({error})") from error


def _atomic_numbers(value: Any) -> np.ndarray:
    """Atomic numbers as bytes; what is no whole number, or would not fit, is refused before the cast hides it."""
    numbers = _array(value, "atomic_numbers")
    if numbers.ndim != 1:
        raise StructureError("atomic_numbers_shape", f"the atomic numbers have shape {numbers.shape}, not (atoms,)")
    bad = numbers[(numbers < 0) | (numbers > 255) | (numbers != np.round(numbers))]
    if bad.size:
        raise StructureError("unknown_element", f"atomic number {bad[0]:g} is no element (1 to {MAX_ATOMIC_NUMBER})")
    return numbers.astype(np.uint8)


def _scalar(value: Any, name: str) -> float:
    array = _array(value, name).reshape(-1)
    if array.size != 1:
        raise StructureError(f"{name}_shape", f"the {name} is not one number but {array.size}")
    return float(array[0])


def _whole(value: Any, name: str) -> int:
    number = _scalar(0 if value is None else value, name)
    if not np.isfinite(number) or number != round(number):
        raise StructureError(f"bad_{name}", f"the {name} is {number}, not a whole number")
    if abs(number) > MAX_WHOLE:
        raise StructureError(f"bad_{name}", f"the {name} is {number:g}, beyond {MAX_WHOLE}")
    return round(number)


def stress_places(order: str) -> np.ndarray:
    """Return which of six numbers stands at each place of the 3 x 3 matrix; raises SourceError for another order."""
    words = order.split()
    names = [{word, word[::-1]} for word in words]
    places = [[[n for n, both in enumerate(names) if row + column in both] for column in "xyz"] for row in "xyz"]
    if len(words) != 6 or any(len(found) != 1 for row in places for found in row):
        raise SourceError(
            f"stress_order '{order}' must hold xx, yy, zz, yz, xz and xy once each, in the source's order."
        )
    return np.array(places)[:, :, 0]


def brief(error: Exception) -> str:
    """First line of an error's text, or its kind."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
