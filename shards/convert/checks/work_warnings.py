"""Whether forces and stress match the energies along the frames of each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.convert.checks.work import FORCES, STRESS
from hydrazero.shards.readers.frames import SourceUnits
from hydrazero.shards.structure import FloatArray
from hydrazero.shards.units import energy_factor, force_factor, length_factor, stress_factor

FEWEST_PAIRS, MANY_PAIRS = 5, 20
"""Smallest numbers of pairs from which a factor, and the lack of any relation, are concluded."""
SMALLEST_CHANGE = 3e-4
"""Change of the energy in eV below which a pair says nothing."""
NEAR = 0.3
"""Relative difference between ratios that count as equal; the energy is not quadratic."""
MOST = 0.6
"""Fraction of the pairs that must have nearly the same ratio of energy to work."""
RIGHT = (0.7, 1.4)
"""Ratios of the energy to the work that are taken for right."""
SAME_UNIT = 0.1
"""Relative difference between a ratio and that of two units up to which the units are named."""

ENERGIES = ("eV", "meV", "Hartree", "Ry", "kcal/mol", "kJ/mol")
LENGTHS = ("Angstrom", "Bohr", "nm")
STRESSES = ("eV/Angstrom^3", "GPa", "kbar", "bar")


def work_warnings(tables: Mapping[int, FloatArray], names: Sequence[str], units: SourceUnits) -> list[str]:
    """Return a sentence for each kind of label that does not match the energies.

    `tables` is source -> table of `WorkPairs`; sources with few pairs are judged together. `names` are those of the
    sources, `units` those in which the labels were read.
    """
    return [text for kind in (FORCES, STRESS) for text in _of_kind(kind, tables, names, units)]


def _of_kind(kind: int, tables: Mapping[int, FloatArray], names: Sequence[str], units: SourceUnits) -> list[str]:
    parts: dict[str, FloatArray] = {}
    rest = []
    for source, table in sorted(tables.items()):
        chosen = _telling(table[table[:, 0] == kind])
        if len(chosen) >= MANY_PAIRS:
            parts[names[source]] = chosen
        elif len(chosen):
            rest.append((names[source], chosen))
    if rest:
        label = rest[0][0] if len(rest) == 1 else f"{rest[0][0]} and {len(rest) - 1} others"
        parts[label] = np.concatenate([chosen for _, chosen in rest])
    faulty: dict[str, list[str]] = {}
    for label, table in parts.items():
        if (fault := _fault(kind, table, units)) is not None:
            faulty.setdefault(fault[0], []).append(label)
    found = []
    for labels in faulty.values():  # one sentence for all sources with the same fault
        fault = _fault(kind, np.concatenate([parts[label] for label in labels]), units)
        shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} others" if len(labels) > 3 else "")
        if fault is not None:
            found.append(f"{shown}: {fault[1]}")
    return found


def _telling(table: FloatArray) -> FloatArray:
    """Return the pairs whose energy changes, and on which work is done."""
    return table[(np.abs(table[:, 2]) > SMALLEST_CHANGE) & (table[:, 1] != 0)]


def _fault(kind: int, table: FloatArray, units: SourceUnits) -> tuple[str, str] | None:
    """Return a fault of the labels of a part: what is the same where the fault is, and a sentence without its subject.

    None stands for labels in which nothing is doubtful.
    """
    if len(table) < FEWEST_PAIRS:
        return None
    label, work = ("forces", "work of the forces") if kind == FORCES else ("stress", "work of the stress")
    between = "between close frames that follow each other, the energy"
    ratios: NDArray[np.float64] = table[:, 2] / table[:, 1]
    per_atom = ratios * table[:, 3]
    if table[:, 3].min() > 1 and _steady(per_atom) and RIGHT[0] < np.median(per_atom) < RIGHT[1]:
        return "per atom", (
            f"{between} changes by the {work} divided by the number of atoms, as if the energies were energies per "
            "atom; set energy_per_atom = true."
        )
    if _steady(ratios):
        ratio = float(np.median(ratios))
        if RIGHT[0] < ratio < RIGHT[1]:
            return None
        causes = _causes(kind, ratio, units)[:2]
        reason = f"as if {' or '.join(causes)}" if causes else f"so the unit of the {label} or the energies is wrong"
        same = " ".join(sorted(causes)) or f"{ratio:.1g}"
        return same, f"{between} changes by {ratio:.3g} times the {work}, {reason}; look at [units]."
    if len(table) >= MANY_PAIRS and _rank_correlation(table[:, 1], table[:, 2]) < 0.3:
        return "nothing", (
            f"{between} changes without any relation to the {work}, so the {label} probably "
            f"belong{'' if kind == FORCES else 's'} to other frames or to another energy; look at [fields]."
        )
    return None


def _steady(ratios: NDArray[np.float64]) -> bool:
    middle = float(np.median(ratios))
    return middle != 0 and float(np.mean(np.abs(ratios / middle - 1) < NEAR)) >= MOST


def _rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _causes(kind: int, ratio: float, units: SourceUnits) -> list[str]:
    """Return the mistakes of units that give a ratio of energy to work, the closest one first."""
    energy, length = energy_factor(units.energy), length_factor(units.length)
    causes = {f"the energies were in {name}": energy / energy_factor(name) for name in ENERGIES if name != units.energy}
    if kind == FORCES:
        forces = force_factor(units.forces)
        causes["the forces had the opposite sign, as gradients have"] = -1.0
        for name in (f"{one}/{per}" for one in ENERGIES for per in LENGTHS if f"{one}/{per}" != units.forces):
            causes |= {
                f"the forces were in {name}": force_factor(name) / forces,
                f"the forces were gradients in {name}": -force_factor(name) / forces,
            }
        causes |= {f"the lengths were in {name}": length_factor(name) / length for name in LENGTHS}
    else:
        stress = stress_factor(units.stress)
        for name in STRESSES:
            causes |= {
                f"the stress was in {name}": stress_factor(name) / stress,
                f"the stress was in {name} and positive under compression (-{name})": -stress_factor(name) / stress,
            }
    close = {cause: abs(ratio / expected - 1) for cause, expected in causes.items()}
    return sorted((cause for cause, away in close.items() if away < SAME_UNIT), key=lambda cause: (close[cause], cause))
