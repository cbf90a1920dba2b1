"""Tables of pairs of elements: smallest distances."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

ELEMENTS = 119
"""Atomic numbers 0 to 118."""


def pair_places(first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the index [P] of each pair of atomic numbers [P] in a flat table of pairs of elements [119 * 119]."""
    low, high = np.minimum(first, second).astype(np.int64), np.maximum(first, second).astype(np.int64)
    places: NDArray[np.int64] = ELEMENTS * low + high
    return places


def closest_pairs(table: NDArray[np.floating]) -> dict[str, float]:
    """Return 'Al-Cu' -> smallest distance in Å, rounded down to 0.01, for all finite entries of a table [119 * 119]."""
    found = np.flatnonzero(np.isfinite(table))
    return {
        f"{chemical_symbols[place // ELEMENTS]}-{chemical_symbols[place % ELEMENTS]}": float(
            np.floor(100.0 * table[place] + 1e-4) / 100.0
        )
        for place in found.tolist()
    }


def listed_pairs(pairs: dict[str, float]) -> dict[str, Any]:
    """Return a compact form of a table of `closest_pairs`: the elements, and a number for every pair of them in order.

    The numbers are in hundredths of an Å, 0 for pairs that the table lacks. Names of pairs would be most of the text
    once it is compressed. `named_pairs` is the inverse.
    """
    elements = sorted({symbol for pair in pairs for symbol in pair.split("-")}, key=atomic_numbers.__getitem__)
    every = ("-".join(pair) for pair in combinations_with_replacement(elements, 2))
    return {"elements": elements, "hundredths": [round(100.0 * pairs.get(pair, 0.0)) for pair in every]}


def named_pairs(listed: dict[str, Any]) -> dict[str, float]:
    """Return the table of which `listed_pairs` has made a compact form."""
    every = combinations_with_replacement(listed["elements"], 2)
    if any(type(number) is not int for number in listed["hundredths"]):
        raise TypeError("distances must be whole hundredths of an Å")
    numbers = zip(every, listed["hundredths"], strict=True)
    return {"-".join(pair): hundredths / 100.0 for pair, hundredths in numbers if hundredths}
