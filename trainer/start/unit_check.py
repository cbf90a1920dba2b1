"""Labels in another unit than they were read in: as alike to what a head predicts as they should be, times a factor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.units import energy_factor, force_factor

ENERGY_UNITS = ("kcal/mol", "kJ/mol", "meV", "Hartree", "Ry")
FORCE_UNITS = (
    "kcal/mol/Å",
    "kJ/mol/Å",
    "kJ/mol/nm",
    "meV/Å",
    "eV/nm",
    "Hartree/Bohr",
    "Hartree/Å",
    "Ry/Bohr",
)
INTERNAL = {
    "forces": ("eV/Å", {unit: force_factor(unit) for unit in FORCE_UNITS}),
    "energies": ("eV", {unit: energy_factor(unit) for unit in ENERGY_UNITS}),
}
"""Unit that labels are read into, and factors to it from the others."""
ALIKE = {"forces": 0.8, "energies": 0.95}
"""Correlation above which a factor between labels and predictions means something; energies are few numbers."""
NEAR = 0.25
"""Of the logarithm of a factor; one that is farther from that of every unit is the head's own fault."""
FEWEST = 10
"""Structures beyond those that the reference energies take, below which energies tell nothing."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How labels compare with predictions."""

    ratio: float
    """Size (root mean square) of the labels over that of the predictions."""
    correlation: float


def likeness(labels: NDArray[np.float64], predicted: NDArray[np.float64]) -> Likeness | None:
    """Compare labels and predictions that should vary around zero; None if one of them does not vary."""
    sizes = float(np.linalg.norm(labels)), float(np.linalg.norm(predicted))
    if min(sizes) <= 1e-12 or not np.isfinite(sizes).all():
        return None
    correlation = float(np.dot(labels.ravel(), predicted.ravel())) / (sizes[0] * sizes[1])
    return Likeness(ratio=sizes[0] / sizes[1], correlation=correlation)


def energy_likeness(
    counts: NDArray[np.float64], labels: NDArray[np.float64], predicted: NDArray[np.float64]
) -> Likeness | None:
    """Compare energies, eV [S], less what reference energies could make of compositions [S, 119]; None for too few."""
    atoms = counts.sum(axis=1, keepdims=True)
    design = counts / atoms
    if len(labels) - np.linalg.matrix_rank(design) < FEWEST:
        return None
    both = np.stack([labels, predicted], axis=1) / atoms
    fitted, *_ = np.linalg.lstsq(design, both, rcond=1e-10)
    rest = both - design @ fitted
    return likeness(rest[:, 0], rest[:, 1])


def suspicion(what: str, found: Likeness) -> str | None:
    """Say in which unit the 'forces' or 'energies' of a task seem to be, in words that follow its name.

    None if nothing is odd. Factors of less than seven, by which a poor head may be off, belong to no unit.
    """
    internal, units = INTERNAL[what]
    if abs(found.correlation) < ALIKE[what]:
        return None
    if found.correlation < 0:
        return (
            f"has {what} of the opposite sign of what the head predicts (correlation {found.correlation:.2f}), as "
            "gradients are, or energies of binding"
        )
    size = f"has {what} {found.ratio:.3g} times those that the head predicts (correlation {found.correlation:.2f}): "
    # Numbers in a unit are one over its factor times those in eV; those in eV, read as in it, its factor times.
    not_told = _nearest(found.ratio, {unit: 1 / factor for unit, factor in units.items()})
    told_wrongly = _nearest(found.ratio, units)
    guesses = [] if not_told is None else [f"in {not_told}, read as {internal}"]
    guesses += [] if told_wrongly is None else [f"in {internal}, read as {told_wrongly}"]
    return f"{size}most likely {', or '.join(guesses)}" if guesses else None


def _nearest(ratio: float, factors: Mapping[str, float]) -> str | None:
    """Return the unit whose factor is nearest to a ratio, None if none is near."""
    distance, unit = min((abs(math.log(ratio / factor)), unit) for unit, factor in factors.items())
    return unit if distance < NEAR else None
