"""Tables of pairs of elements: smallest distances."""

from __future__ import annotations

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

ELEMENTS = 119
"""Atomic numbers 0 to 118."""


def pair_places(first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the place of each pair of atomic numbers [P] in a flat table of pairs of elements [119 * 119]."""
    low, high = np.minimum(first, second).astype(np.int64), np.maximum(first, second).astype(np.int64)
    places: NDArray[np.int64] = ELEMENTS * low + high
    return places


def closest_pairs(table: NDArray[np.floating]) -> dict[str, float]:
    """Return 'Al-Cu' -> smallest distance, Å, rounded down to 0.01, of the pairs that a flat table [119 * 119] has."""
    found = np.flatnonzero(np.isfinite(table))
    return {
        f"{chemical_symbols[place // ELEMENTS]}-{chemical_symbols[place % ELEMENTS]}": float(
            np.floor(100.0 * table[place] + 1e-4) / 100.0
        )
        for place in found.tolist()
    }
