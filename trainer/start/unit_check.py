"""Find labels that are in another unit than assumed: they correlate with predictions, but differ by a factor."""

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
"""Internal unit of the labels, and factors of other units to it."""
ALIKE = {"forces": 0.8, "energies": 0.95}
"""Correlation above which a factor between labels and predictions is meaningful; energies are few numbers."""
NEAR = 0.25
"""Largest distance between logarithms at which a factor is attributed to a unit, and not to the head's errors."""
FEWEST = 10
"""Smallest number of structures beyond the number of reference energies at which energies are compared."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """A comparison of labels with predictions."""

    ratio: float
    """Size (root mean square) of the labels over that of the predictions."""
    correlation: float
    """Uncentred correlation of the labels with the predictions, -1 to 1."""


def likeness(labels: NDArray[np.float64], predicted: NDArray[np.float64]) -> Likeness | None:
    """Compare labels and predictions that vary around zero; return None if one of them does not vary."""
    sizes = float(np.linalg.norm(labels)), float(np.linalg.norm(predicted))
    if min(sizes) <= 1e-12 or not np.isfinite(sizes).all():
        return None
    correlation = float(np.dot(labels.ravel(), predicted.ravel())) / (sizes[0] * sizes[1])
    return Likeness(ratio=sizes[0] / sizes[1], correlation=correlation)


def energy_likeness(
    counts: NDArray[np.float64], labels: NDArray[np.float64], predicted: NDArray[np.float64]
) -> Likeness | None:
    """Compare energies, eV [S], after a fit to compositions [S, 119] is subtracted; return None for too few."""
    atoms = counts.sum(axis=1, keepdims=True)
    design = counts / atoms
    if len(labels) - np.linalg.matrix_rank(design) < FEWEST:
        return None
    both = np.stack([labels, predicted], axis=1) / atoms
    fitted, *_ = np.linalg.lstsq(design, both, rcond=1e-10)
    rest = both - design @ fitted
    return likeness(rest[:, 0], rest[:, 1])


def suspicion(what: str, found: Likeness) -> str | None:
    """Return in which unit the 'forces' or 'energies' of a task seem to be, in words that follow the task's name.

    Return None if nothing is suspicious. A poor head may be wrong by a factor below seven, which belongs to no unit.
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
    # Numbers in a unit are those in eV divided by its factor; numbers in eV that were read as that unit are multiplied.
    not_told = _nearest(found.ratio, {unit: 1 / factor for unit, factor in units.items()})
    told_wrongly = _nearest(found.ratio, units)
    guesses = [] if not_told is None else [f"in {not_told}, read as {internal}"]
    guesses += [] if told_wrongly is None else [f"in {internal}, read as {told_wrongly}"]
    return f"{size}most likely {', or '.join(guesses)}" if guesses else None


def _nearest(ratio: float, factors: Mapping[str, float]) -> str | None:
    """Return the unit whose factor is nearest to a ratio, or None if none is near enough."""
    distance, unit = min((abs(math.log(ratio / factor)), unit) for unit, factor in factors.items())
    return unit if distance < NEAR else None
