"""Parts that readers share: settings, frames, and the conversion of raw labels into a checked Structure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.missing_labels import missing_label
from hydrazero.shards.readers.parts.fixed_atoms import fixed_in
from hydrazero.shards.readers.parts.geometry import cell_matrix, numbers_in, periodicity
from hydrazero.shards.settings_parser import Section
from hydrazero.shards.structure import Structure, atomic_numbers_of, charge_of, check_structure, multiplicity_of
from hydrazero.shards.targets import TargetSection, target_value
from hydrazero.shards.units import energy_factor, force_factor, known_unit, length_factor, stress_factor

ASE_STRESS_ORDER = "xx yy zz yz xz xy"
"""Order of the six numbers of a symmetric stress in ASE; VASP writes xx yy zz xy yz xz."""


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
    """Field of the total charge. If this is not set, a name that the format has for it is read as well."""
    multiplicity: str = "multiplicity"
    """Field of the spin multiplicity. If this is not set, a name that the format has for it is read as well."""


class SourceUnits(Section):
    """Units of the source; values are converted into Å, eV, eV/Å and eV/Å³.

    A unit that the file itself states is used where none is set here, and must agree with one that is.
    """

    length: Annotated[str, AfterValidator(known_unit(length_factor))] = "Angstrom"
    """Unit of positions and cells: 'Angstrom' (also 'Å', 'Ang', 'A'), 'Bohr' ('a0'), 'nm' or 'pm'. Of every kind, 'au'
    or 'a.u.' is the atomic unit."""
    energy: Annotated[str, AfterValidator(known_unit(energy_factor))] = "eV"
    """Unit of energies: 'eV', 'meV', 'Hartree' (also 'Ha', 'Eh'), 'mHartree' ('mHa'), 'Ry', 'kcal/mol' or 'kJ/mol'."""
    forces: Annotated[str, AfterValidator(known_unit(force_factor))] = "eV/Angstrom"
    """Unit of forces: a unit of energy over a unit of length, such as 'Hartree/Bohr'; with a minus sign, as in
    '-Hartree/Bohr', if the source holds gradients."""
    stress: Annotated[str, AfterValidator(known_unit(stress_factor))] = "eV/Angstrom^3"
    """Unit of the stress, with its sign: 'eV/Angstrom^3', 'Hartree/Bohr^3', 'Pa', 'kPa', 'MPa', 'GPa', 'bar', 'kbar' or
    'Mbar' if it is positive under tension, as in ASE; '-GPa', '-kbar' and so on if it is positive under compression, as
    in VASP."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """Settings of a reader."""

    format: str | None = None
    """Name of the format; guessed from the suffix of the file if it is None."""
    fields: FieldNames = field(default_factory=FieldNames)
    units: SourceUnits = field(default_factory=SourceUnits)
    columns: Mapping[str, str] = field(default_factory=dict)
    """Part of a structure -> its name in the source. Parts are 'numbers', 'positions', 'cell', 'pbc', the labels, and
    'ptr' or 'n_atoms' for ragged arrays; any other part becomes a field of the frame."""
    require: tuple[str, ...] = ()
    """Labels that every frame must have: 'energy', 'forces', 'stress', 'charge', 'multiplicity', or targets."""
    absent_if_zero: tuple[str, ...] = ()
    """Labels, 'forces' or 'stress', that count as absent where all their numbers are zero."""
    energy_per_atom: bool = False
    """Whether the energies of the source are divided by the number of atoms."""
    stress_order: str = ASE_STRESS_ORDER
    """Order of the six numbers of a stress or virial in the source."""
    targets: Mapping[str, TargetSection] = field(default_factory=dict)
    """Name -> further quantity."""
    trust_pickle: bool = False
    """Whether pickles may be loaded, which can run any code."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame of a source: a structure, or the error that makes it unusable."""

    source_id: str
    """'file#frame'."""
    structure: Structure | None = None
    error: StructureError | None = None
    unlabelled: Structure | None = None
    """The structure of a frame that is unusable only because it lacks a label."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the frame, for grouping and selection."""
    units: SourceUnits = field(default_factory=SourceUnits)
    """Units that it was read in: those of the settings or of the file."""


@dataclass(frozen=True, kw_only=True)
class UnreadFrame:
    """A frame that a reader has found but not read yet, so that several processes can share a source."""

    source_id: str
    read: Callable[[], Frame]
    """Function that reads the frame; it is valid until the reader is asked for the next frame."""
    fraction: float
    """Fraction of the source up to the end of this frame, 0 to 1, from which the remaining time is estimated."""


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
    """Cell of shape [3, 3], three lengths, three lengths and three angles in degrees, or None if there is none."""
    pbc: Any
    """One flag or three, or None for the directions of the cell vectors that are not zero."""
    energy: Any = None
    forces: Any = None
    stress: Any = None
    """Stress of shape [3, 3], [9], or [6] in the order of the settings. A label whose numbers are all NaN is absent."""
    virial: Any = None
    charge: Any = None
    """Total charge; None counts as 0 unless the settings require it. The same holds for the multiplicity."""
    multiplicity: Any = None
    other: Mapping[str, Any] = field(default_factory=dict)
    """Further values of the frame by their names in the source; targets are looked up here, then in the info."""
    constraints: tuple[Any, ...] = ()
    """ASE's constraints on its atoms."""


class FrameMaker:
    """Converts raw frames into frames: units, required labels, checks."""

    def __init__(self, settings: ReadSettings) -> None:
        self.settings = settings
        units = settings.units
        self._length, self._energy = length_factor(units.length), energy_factor(units.energy)
        self._forces, self._stress = force_factor(units.forces), stress_factor(units.stress)
        self._places = stress_places(settings.stress_order)

    def make(self, raw: RawFrame, source_id: str, info: Mapping[str, Any]) -> Frame:
        """Return a checked frame in eV and Å; a fault becomes the error of the frame."""
        checked = None
        try:
            structure = self._structure(raw, source_id, info)
            check_structure(structure)
            checked = structure
            self._check_required(raw, structure, info)
        except StructureError as error:
            return Frame(source_id=source_id, error=error, unlabelled=checked, info=info)
        return Frame(source_id=source_id, structure=structure, info=info, units=self.settings.units)

    def _structure(self, raw: RawFrame, source_id: str, info: Mapping[str, Any]) -> Structure:
        numbers = atomic_numbers_of(numbers_in(raw.numbers, "atomic_numbers"))
        cell = cell_matrix(raw.cell, self._length)
        return Structure(
            numbers=numbers,
            positions=self._length * numbers_in(raw.positions, "positions"),
            cell=cell,
            pbc=periodicity(raw.pbc, cell),
            energy=self._energy_of(raw, len(numbers)),
            forces=self._unless_zero("forces", self._forces, _known(raw.forces, "forces")),
            stress=self._stress_of(raw, cell),
            charge=charge_of(_known(raw.charge, "charge")),
            multiplicity=multiplicity_of(_known(raw.multiplicity, "multiplicity")),
            targets=self._targets("structure", raw, info, len(numbers)),
            atom_targets=self._targets("atom", raw, info, len(numbers)),
            source_id=source_id,
            constraints=raw.constraints or fixed_in({**info, **raw.other}, len(numbers)),
        )

    def _targets(self, of: str, raw: RawFrame, info: Mapping[str, Any], atoms: int) -> dict[str, np.ndarray]:
        found = {
            name: target_value(name, target, raw.other.get(target.field, info.get(target.field)), atoms)
            for name, target in self.settings.targets.items()
            if target.of == of
        }
        return {name: value for name, value in found.items() if value is not None}

    def _energy_of(self, raw: RawFrame, atoms: int) -> float | None:
        value = _known(raw.energy, "energy")
        if value is None:
            return None
        energy = self._energy * _scalar(value, "energy")
        return energy * atoms if self.settings.energy_per_atom else energy

    def _stress_of(self, raw: RawFrame, cell: np.ndarray) -> np.ndarray | None:
        virial, stress = _known(raw.virial, "virial"), _known(raw.stress, "stress")
        if virial is not None:
            volume = abs(np.linalg.det(cell))
            if volume < 1e-6:
                raise StructureError("singular_cell", "a virial is given, but the cell has no volume")
            return -self._energy * self._matrix(virial, "virial") / volume
        return self._unless_zero("stress", self._stress, None if stress is None else self._matrix(stress, "stress"))

    def _unless_zero(self, label: str, factor: float, values: np.ndarray | None) -> np.ndarray | None:
        if values is None or (label in self.settings.absent_if_zero and not values.any()):
            return None
        return factor * values

    def _matrix(self, array: np.ndarray, name: str) -> np.ndarray:
        """Return a symmetric matrix [3, 3] from numbers of shape [3, 3], [9] or [6]."""
        if array.size == 9:
            matrix = array.reshape(3, 3)
            return 0.5 * (matrix + matrix.T)
        if array.shape == (6,):
            return array[self._places]
        raise StructureError(f"{name}_shape", f"the {name} has shape {array.shape}, not (3, 3), (9,) or (6,)")

    def _check_required(self, raw: RawFrame, structure: Structure, info: Mapping[str, Any]) -> None:
        for label in self.settings.require:
            given, because = getattr(raw, label, None), "NaN"
            # A structure always has a charge and a multiplicity, even if the source does not.
            if label in self.settings.targets:
                held, name = (
                    {**structure.targets, **structure.atom_targets}.get(label),
                    self.settings.targets[label].field,
                )
            else:
                in_source = label in ("charge", "multiplicity")
                held = _known(given, label) if in_source else getattr(structure, label)
                name = getattr(self.settings.fields, label)
            if held is None:
                if label in self.settings.absent_if_zero and _known(given, label) is not None:
                    because = "zero"
                fields = {**raw.other, **info}
                raise missing_label(label, name, fields, len(structure), because="" if given is None else because)


def _known(value: Any, name: str) -> np.ndarray | None:
    """Return a label as an array, None if it is absent: not given, or NaN throughout."""
    if value is None:
        return None
    array = numbers_in(value, name)
    return None if array.size and np.isnan(array).all() else array


def _scalar(value: np.ndarray, name: str) -> float:
    array = value.reshape(-1)
    if array.size != 1:
        raise StructureError(f"{name}_shape", f"the {name} has {array.size} numbers, not one")
    return float(array[0])


def stress_places(order: str) -> np.ndarray:
    """Return the index [3, 3] of the number at each place of a stress matrix; raise SourceError for a wrong order."""
    words = order.split()
    names = [{word, word[::-1]} for word in words]
    places = [[[n for n, both in enumerate(names) if row + column in both] for column in "xyz"] for row in "xyz"]
    if len(words) != 6 or any(len(found) != 1 for row in places for found in row):
        raise SourceError(
            f"stress_order '{order}' must hold xx, yy, zz, yz, xz and xy once each, in the source's order."
        )
    return np.array(places)[:, :, 0]


_NO_NUMBER = re.compile(
    r"(could not convert string to (?:float|complex|int\w*)|invalid literal for int\(\) with base 10): "
    r"(?:np\.(?:str|bytes)_\()?b?(['\"])(?P<text>.*)\2\)?"
)
"""What Python and NumPy say of a text that is no number."""


def brief(error: Exception) -> str:
    """Return the first line of the text of an error, or the name of its class; texts that are no numbers by name."""
    text = str(error).strip().splitlines()
    if text and (found := _NO_NUMBER.fullmatch(text[0])):
        return f"'{found['text'][:60]}' is not a {'whole ' * ('int' in found[1])}number"
    return text[0][:200] if text else type(error).__name__
