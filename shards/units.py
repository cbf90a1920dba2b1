"""Units of source files; readers convert values once, into eV, Å, eV/Å and eV/Å³.

A unit is a product of names with exponents, such as 'kcal/mol/Å', 'eV Å^-1' or 'Hartree/Bohr^3'. Values are the CODATA
values of `ase.units`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Container
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from ase import units as _ase

from hydrazero.shards.errors import SourceError

INTERNAL_UNITS = {"length": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å³", "charge": "e"}

Dimension = tuple[int, int, int, int, int]
"""Powers of energy, length, amount, charge and magnetic moment. Energies such as kcal have one power of amount, so that
they are those of a structure only if they are divided by mol."""

NONE: Dimension = (0, 0, 0, 0, 0)
ENERGY: Dimension = (1, 0, 0, 0, 0)
LENGTH: Dimension = (0, 1, 0, 0, 0)
FORCE: Dimension = (1, -1, 0, 0, 0)
STRESS: Dimension = (1, -3, 0, 0, 0)
VOLUME: Dimension = (0, 3, 0, 0, 0)
CHARGE: Dimension = (0, 0, 0, 1, 0)
DIPOLE: Dimension = (0, 1, 0, 1, 0)
MOMENT: Dimension = (0, 0, 0, 0, 1)
MOLAR: Dimension = (1, 0, 1, 0, 0)
AMOUNT: Dimension = (0, 0, 1, 0, 0)

# In these the case of a letter decides: m is milli, M is mega.
_EXACT: dict[str, tuple[float, Dimension]] = {
    "meV": (1e-3, ENERGY),
    **dict.fromkeys(("mHa", "mHartree", "mEh"), (1e-3 * _ase.Hartree, ENERGY)),
    "mRy": (1e-3 * _ase.Rydberg, ENERGY),
    **dict.fromkeys(("A", "AA"), (1.0, LENGTH)),
    "pm": (0.01, LENGTH),
    "MPa": (1e-3 * _ase.GPa, STRESS),
    "mbar": (1e-7 * _ase.GPa, STRESS),
    "Mbar": (1e2 * _ase.GPa, STRESS),
    "kB": (0.1 * _ase.GPa, STRESS),  # as VASP writes kbar
    "eA": (1.0, DIPOLE),
    "D": (_ase.Debye, DIPOLE),
}
# Small letters; capitals change nothing.
_ANY_CASE: dict[str, tuple[float, Dimension]] = {
    **dict.fromkeys(("ev", "electronvolt", "electronvolts"), (1.0, ENERGY)),
    **dict.fromkeys(("hartree", "hartrees", "ha", "eh", "e_h"), (_ase.Hartree, ENERGY)),
    **dict.fromkeys(("ry", "ryd", "rydberg", "rydbergs"), (_ase.Rydberg, ENERGY)),
    # Of one molecule, once divided by mol.
    "kcal": (_ase.kcal / _ase.mol, MOLAR),
    "kj": (_ase.kJ / _ase.mol, MOLAR),
    **dict.fromkeys(("mol", "mole"), (1.0, AMOUNT)),
    **dict.fromkeys(("å", "ang", "angs", "angstrom", "angstroms", "angström", "ångström"), (1.0, LENGTH)),
    **dict.fromkeys(("bohr", "bohrs", "a0", "a_0"), (_ase.Bohr, LENGTH)),
    "nm": (10.0, LENGTH),
    "pa": (1e-9 * _ase.GPa, STRESS),
    "kpa": (1e-6 * _ase.GPa, STRESS),
    "gpa": (_ase.GPa, STRESS),
    "bar": (1e-4 * _ase.GPa, STRESS),
    "kbar": (0.1 * _ase.GPa, STRESS),
    "e": (1.0, CHARGE),
    **dict.fromkeys(("eå", "eang", "eangstrom"), (1.0, DIPOLE)),
    **dict.fromkeys(("ea0", "ebohr"), (_ase.Bohr, DIPOLE)),
    "debye": (_ase.Debye, DIPOLE),
    **dict.fromkeys(("mub", "mu_b", "\u03bcb", "\u03bc_b"), (1.0, MOMENT)),
}
_ATOMIC = ("au", "a.u.", "atomic units")
"""Names of the atomic unit of whatever is measured."""
_LONG_NAMES = ("Hartree", "Rydberg", "Angstrom", "Bohr", "Debye")
"""Names that are suggested for similar ones. Their first letters are no prefixes that a change of case would alter."""
_BETWEEN = re.compile(r"\s*[*/·⋅]?\s*")
_FACTOR = re.compile(r"(?P<name>[^\W\d_]+(?:_?0(?!\d)|_[^\W\d]+)?)(?:(?:\^|\*\*)?(?P<power>-?\d+))?")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a unit is one of."""

    name: str
    """Beginning of the sentence on an unknown unit."""
    dimension: Dimension
    atomic: float
    """The atomic unit, in the internal unit."""
    known: str
    """Units that are known, for that sentence."""
    signed: bool = False
    """Whether a minus sign may stand in front."""


_ENERGY_NAMES = "eV, meV, Hartree (Ha), mHartree (mHa), Ry, kcal/mol, kJ/mol"
_LENGTH_NAMES = "Angstrom (Å, Ang, A), Bohr (a0), nm, pm"
_ENERGY_KIND = _Kind(name="energy unit", dimension=ENERGY, atomic=_ase.Hartree, known=_ENERGY_NAMES)
_LENGTH_KIND = _Kind(name="length unit", dimension=LENGTH, atomic=_ase.Bohr, known=_LENGTH_NAMES)
_FORCE_KIND = _Kind(
    name="force unit",
    dimension=FORCE,
    atomic=_ase.Hartree / _ase.Bohr,
    known=f"an energy over a length, such as eV/Angstrom, with a minus sign for gradients; energies are "
    f"{_ENERGY_NAMES}, lengths {_LENGTH_NAMES}",
    signed=True,
)
_STRESS_KIND = _Kind(
    name="stress unit",
    dimension=STRESS,
    atomic=_ase.Hartree / _ase.Bohr**3,
    known="eV/Angstrom^3, Hartree/Bohr^3, Pa, kPa, MPa, GPa, bar, kbar, Mbar, with a minus sign if it is positive "
    "under compression",
    signed=True,
)
_TARGETS = {ENERGY: "eV", CHARGE: "e", MOMENT: "µB", DIPOLE: "eÅ", VOLUME: "Å³"}
"""Dimension of a target -> its internal unit."""
_TARGET_NAMES = f"{_ENERGY_NAMES}, e, muB, e*Angstrom, e*Bohr, Debye, Angstrom^3, Bohr^3"


def energy_factor(unit: str) -> float:
    """Return the factor from `unit` to eV; raise SourceError for an unknown unit."""
    return _factor(unit, _ENERGY_KIND)


def length_factor(unit: str) -> float:
    """Return the factor from `unit` to Å; raise SourceError for an unknown unit."""
    return _factor(unit, _LENGTH_KIND)


def force_factor(unit: str) -> float:
    """Return the factor from 'energy/length' (such as 'kcal/mol/Angstrom') to eV/Å; raise SourceError if unknown.

    It is negative for a unit with a minus sign, which turns gradients into forces.
    """
    return _factor(unit, _FORCE_KIND)


def stress_factor(unit: str) -> float:
    """Return the signed factor from `unit` to eV/Å³, positive under tension; raise SourceError if unknown."""
    return _factor(unit, _STRESS_KIND)


def target_unit(unit: str) -> tuple[float, str]:
    """Return the factor to the internal unit of a target, and that unit; raise SourceError if unknown."""
    if not unit.strip():
        return 1.0, ""
    hint = ""
    try:
        factor, dimension = _parsed(unit)
    except KeyError as error:
        hint = _suggestion(unit, str(error.args[0]), _TARGETS)
    else:
        if dimension in _TARGETS:
            return factor, _TARGETS[dimension]
    raise SourceError(f"unit '{unit}' of a target is not known{hint or f' (known: {_TARGET_NAMES})'}.")


def known_unit(factor: Callable[[str], float]) -> Callable[[str], str]:
    """Return a check that returns a unit unchanged, and raises SourceError if `factor` does not know it."""

    def check(unit: str) -> str:
        factor(unit)
        return unit

    return check


def _factor(unit: str, kind: _Kind) -> float:
    text = _plain(unit)
    sign, text = (-1.0, text[1:].strip()) if kind.signed and text.startswith("-") else (1.0, text)
    if text.lower() in _ATOMIC:
        return sign * kind.atomic
    try:
        factor, dimension = _parsed(text)
    except KeyError as error:
        hint = _suggestion(text, str(error.args[0]), (kind.dimension,))
    else:
        if dimension == kind.dimension:
            return sign * factor
        hint = ""
    if "atom" in text.lower():
        hint = "; for energies that are divided by the number of atoms set energy_per_atom = true"
    raise SourceError(f"{kind.name} '{unit}' is not known{hint or f' (known: {kind.known})'}.")


def _plain(unit: str) -> str:
    """Return the text with one form of letters that look alike, such as the two of Å, and without raised digits."""
    return unicodedata.normalize("NFKC", unit).replace("\u2212", "-").strip()


@lru_cache(maxsize=256)  # files state the units of every group
def _parsed(unit: str) -> tuple[float, Dimension]:
    """Return value and dimension of a product of names; raise KeyError with the name that is not known, or ''."""
    text = _plain(unit)
    # A group in brackets after a slash is divided by as a whole.
    text = re.sub(r"/\s*\(([^()/]*)\)", lambda group: "/" + "/".join(re.split(r"[*·⋅\s]+", group[1].strip())), text)
    value, powers, place = 1.0, list(NONE), 0
    while place < len(text):
        between = _BETWEEN.match(text, place)
        assert between is not None  # it matches nothing, too
        found = _FACTOR.match(text, between.end())
        if found is None or (place == 0) != (between[0] == ""):
            raise KeyError("")
        size, dimension = _named(found["name"])
        power = int(found["power"] or 1) * (-1 if "/" in between[0] else 1)
        if abs(power) > 3:
            raise KeyError("")
        value = value / size**-power if power < 0 else value * size**power
        powers = [sum(both) for both in zip(powers, (power * each for each in dimension), strict=True)]
        place = found.end()
    first, second, third, fourth, fifth = powers
    return value, (first, second, third, fourth, fifth)


def _named(name: str) -> tuple[float, Dimension]:
    known = _EXACT.get(name) or _ANY_CASE.get(name.lower())
    if known is None:
        raise KeyError(name)
    return known


def _suggestion(text: str, name: str, dimensions: Container[Dimension]) -> str:
    """Return ' (did you mean X?)' where a long name is misspelt and the corrected unit has one of the dimensions."""
    close = get_close_matches(name.lower(), [long.lower() for long in _LONG_NAMES], n=1, cutoff=0.7)
    if not close or close[0][0] != name[0].lower():
        return ""
    corrected = text.replace(name, close[0].capitalize())
    try:
        right = _parsed(corrected)[1] in dimensions
    except KeyError:
        return ""
    return f" (did you mean '{corrected}'?)" if right else ""
