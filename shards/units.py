"""Units of source files; readers convert values once, into eV, Å, eV/Å and eV/Å³.

Values are the CODATA values of `ase.units`.
"""

from collections.abc import Callable

from ase import units as _ase

from hydrazero.shards.errors import SourceError, did_you_mean

INTERNAL_UNITS = {"length": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å³", "charge": "e"}

ENERGY = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": _ase.Hartree,
    "Ry": _ase.Rydberg,
    "kcal/mol": _ase.kcal / _ase.mol,
    "kJ/mol": _ase.kJ / _ase.mol,
}
LENGTH = {"Å": 1.0, "Angstrom": 1.0, "Bohr": _ase.Bohr, "nm": 10.0}
# The sign convention is part of the unit: ASE's stress is positive under tension, VASP's kbar output the reverse.
STRESS = {
    "eV/Å^3": 1.0,
    "eV/Angstrom^3": 1.0,
    "GPa": _ase.GPa,
    "kbar": 0.1 * _ase.GPa,
    "bar": 1e-4 * _ase.GPa,
    "-eV/Å^3": -1.0,
    "-GPa": -_ase.GPa,
    "-kbar": -0.1 * _ase.GPa,
    "-bar": -1e-4 * _ase.GPa,
}


# Units of targets: unit -> internal unit and the factor to it.
TARGETS = {
    "": ("", 1.0),
    **{name: ("eV", factor) for name, factor in ENERGY.items()},
    "e": ("e", 1.0),
    "muB": ("µB", 1.0),
    "µB": ("µB", 1.0),
    "\u03bcB": ("µB", 1.0),  # the Greek letter, which looks like the micro sign
    "eÅ": ("eÅ", 1.0),
    "e*Angstrom": ("eÅ", 1.0),
    "e*Bohr": ("eÅ", _ase.Bohr),
    "Debye": ("eÅ", _ase.Debye),
    "Å³": ("Å³", 1.0),
    "Å^3": ("Å³", 1.0),
    "Angstrom^3": ("Å³", 1.0),
    "Bohr^3": ("Å³", _ase.Bohr**3),
}


def target_unit(unit: str) -> tuple[float, str]:
    """Return the factor to the internal unit of a target, and that unit; raise SourceError if unknown."""
    if unit not in TARGETS:
        raise SourceError(f"unit '{unit}' of a target is not known{did_you_mean(unit, list(TARGETS))}.")
    internal, factor = TARGETS[unit]
    return factor, internal


def _lookup(kind: str, table: dict[str, float], unit: str) -> float:
    if unit not in table:
        raise SourceError(f"{kind} unit '{unit}' is not known{did_you_mean(unit, list(table))}.")
    return table[unit]


def energy_factor(unit: str) -> float:
    """Return the factor from `unit` to eV; raise SourceError for an unknown unit."""
    return _lookup("energy", ENERGY, unit)


def length_factor(unit: str) -> float:
    """Return the factor from `unit` to Å; raise SourceError for an unknown unit."""
    return _lookup("length", LENGTH, unit)


def force_factor(unit: str) -> float:
    """Return the factor from 'energy/length' (such as 'kcal/mol/Angstrom') to eV/Å; raise SourceError if unknown."""
    energy, _, length = unit.rpartition("/")
    if energy not in ENERGY or length not in LENGTH:
        known = [f"{e}/{x}" for e in ENERGY for x in LENGTH]
        raise SourceError(f"force unit '{unit}' is not known{did_you_mean(unit, known)}.")
    return ENERGY[energy] / LENGTH[length]


def stress_factor(unit: str) -> float:
    """Return the signed factor from `unit` to eV/Å³, positive under tension; raise SourceError if unknown."""
    return _lookup("stress", STRESS, unit)


def known_unit(factor: Callable[[str], float]) -> Callable[[str], str]:
    """Return a check that returns a unit unchanged, and raises SourceError if `factor` does not know it."""

    def check(unit: str) -> str:
        factor(unit)
        return unit

    return check
