"""Whether structures of the same atoms have energies of the same order of magnitude, whatever the other structures."""

from __future__ import annotations

import numpy as np

from hydrazero.shards.convert.checks.magnitudes import RATIOS, EnergySample
from hydrazero.shards.structure import FloatArray

FEWEST = 4
"""Number of structures of each of two groups of energies."""
NARROW = 0.02
"""Largest relative width of a group of energies; total energies of the same atoms differ by less."""
LARGE = 3.0
"""Ratio of two groups of energies that no change of the geometry explains."""
SAME_RATIO = 0.03
"""Largest relative difference of a ratio from the one that explains it."""


def same_atoms_warning(sample: EnergySample) -> str | None:
    """Return a sentence about structures of the same atoms whose energies fall into two groups; None if there are none.

    This also finds what comparisons with most structures do not: that half of the energies are of another kind.
    """
    _, kinds = np.unique(sample.counts[:, sample.counts.any(axis=0)], axis=0, return_inverse=True)
    for kind in range(int(kinds.max(initial=-1)) + 1):
        rows = np.flatnonzero(kinds.reshape(-1) == kind)
        atoms = int(sample.counts[rows[0]].sum())
        if atoms >= 3 and (split := _split(sample.energies[rows])) is not None:
            small, ratio = rows[split[0]], split[1]
            large = np.setdiff1d(rows, small)
            return (
                f"the energies of {len(small):,} structures of the same {atoms} atoms, such as "
                f"{sample.names[small[0]]}, are smaller by a factor of {ratio:.4g} than those of "
                f"{len(large):,} others, such as {sample.names[large[0]]}, {_reason(ratio, atoms)}; convert such "
                "structures separately, or leave them out."
            )
    return None


def _split(energies: FloatArray) -> tuple[np.ndarray, float] | None:
    """Return which energies are in the smaller of two narrow groups, and the ratio of the groups; None without them."""
    sizes = np.abs(energies)
    if len(sizes) < 2 * FEWEST or not sizes.all() or np.ptp(np.sign(energies)):
        return None
    small = sizes < np.sqrt(sizes.min() * sizes.max())
    groups = sizes[~small], sizes[small]
    if min(map(len, groups)) < FEWEST or any(np.ptp(group) > NARROW * group.mean() for group in groups):
        return None
    ratio = float(groups[0].mean() / groups[1].mean())
    return (small, ratio) if ratio > LARGE else None


def _reason(ratio: float, atoms: int) -> str:
    if abs(ratio / atoms - 1) < SAME_RATIO:
        return "as if they were divided by the number of atoms"
    for units, expected in RATIOS.items():
        if abs(ratio / expected - 1) < SAME_RATIO:
            return f"the ratio of {units}"
    return "which no change of the geometry explains"
