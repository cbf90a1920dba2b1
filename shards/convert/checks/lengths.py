"""Whether the shortest distances fit the sizes of the atoms, which shows lengths in another unit."""

from __future__ import annotations

import numpy as np
from ase.data import covalent_radii
from numpy.typing import NDArray

from hydrazero.shards.convert.checks.magnitudes import median_of
from hydrazero.shards.graphs.neighbours import HalfPairs
from hydrazero.shards.readers.frames import SourceUnits
from hydrazero.shards.structure import FloatArray, Structure
from hydrazero.shards.units import length_factor

RATIO_EDGES = np.logspace(-3, 3, 601)
"""Edges of the bins of the ratios of distances to sums of covalent radii, a hundred bins per decade."""
PROBABLE = (0.62, 1.6)
"""Range of the median of the smallest ratios; it is 0.85 to 1.25 for nearly all matter."""
SAME_LENGTH = 0.25
"""Largest difference of a ratio from 1 with which a unit is named."""
UNITS = ("Angstrom", "Bohr", "nm", "pm")
NOBLE_GASES = (2, 10, 18, 36, 54, 86)


def smallest_ratio(structure: Structure, pairs: HalfPairs, distances: FloatArray, cutoff: float) -> float | None:
    """Return the smallest ratio of a distance to the sum of the covalent radii of its two atoms.

    `pairs` are those within `cutoff` Å. If none is close, the ratio is the smallest that the others can have. None
    stands for a structure whose ratio says nothing: a single atom, a molecule of two atoms, whose bond may be
    stretched in a scan, and a structure of noble gases alone.
    """
    isolated = len(structure) <= 2 and len(distances) <= 1  # also in a large periodic cell
    if isolated or np.isin(structure.numbers, NOBLE_GASES).all():
        return None
    radii = covalent_radii[structure.numbers]
    ratios = distances / (radii[pairs.first] + radii[pairs.second])
    return float(min(ratios.min(initial=np.inf), cutoff / (2 * radii.max())))


def length_warning(counts: NDArray[np.int64], units: SourceUnits) -> str | None:
    """Return a sentence about improbable lengths from the numbers of structures in the bins of RATIO_EDGES."""
    ratio = median_of(counts, RATIO_EDGES)
    if not counts.sum() or PROBABLE[0] <= ratio <= PROBABLE[1]:
        return None
    now = length_factor(units.length)
    away = {name: abs(ratio * length_factor(name) / now - 1) for name in UNITS}
    unit = min(away, key=lambda name: away[name])
    reason = "improbable" if away[unit] > SAME_LENGTH else f"probably in {unit}, not in {units.length}"
    side = "at least" if ratio > 1 else "at most"
    return (
        f"the lengths are {reason}: in half of the structures, the shortest distance is {side} {ratio:.2g} times the "
        "sum of the covalent radii of its two atoms; look at units.length."
    )
