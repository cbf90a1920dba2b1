"""Atomic numbers from chemical symbols."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from hydrazero.shards.errors import StructureError
from hydrazero.shards.text.foreign_text import escaped


def numbers_of(symbols: Iterable[Any]) -> NDArray[np.uint8]:
    """Return the atomic numbers [atoms] of chemical symbols; raise StructureError for an unknown symbol."""
    names = [symbol.decode("ascii", "replace") if isinstance(symbol, bytes) else str(symbol) for symbol in symbols]
    for name in names:
        if atomic_numbers.get(name, 0) < 1:
            raise StructureError("unknown_element", f"'{escaped(name[:40])}' is not a chemical element")
    return np.array([atomic_numbers[name] for name in names], dtype=np.uint8)
