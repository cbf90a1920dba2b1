"""Total charge and spin multiplicity: what counts as a given value, wherever it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np

from hydrazero.shards.errors import StructureError

MAX_WHOLE = 32767
"""Largest absolute charge and multiplicity, since blocks store them as int16."""
TOLERANCE = 1e-6
"""Largest distance from an integer; sums of partial charges, for example, miss it by rounding errors."""


def charge_of(value: Any, name: str = "the charge") -> int:
    """Return a total charge in e, 0 if the value is None; raise StructureError unless it is one whole number."""
    return 0 if value is None else _whole(value, "charge", name)


def multiplicity_of(value: Any, name: str = "the multiplicity") -> int:
    """Return a spin multiplicity 2S+1, 0 (unknown) if the value is None.

    Raises StructureError unless it is one whole number of at least 1.
    """
    if value is None:
        return 0
    found = _whole(value, "multiplicity", name)
    if found < 1:
        raise StructureError("bad_multiplicity", f"{name} is {found}; a spin multiplicity 2S+1 is at least 1")
    return found


def _whole(value: Any, kind: str, name: str) -> int:
    try:
        numbers = np.asarray(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise StructureError(f"{kind}_shape", f"{name} is {value!r}, not a whole number") from error
    if numbers.size != 1:
        raise StructureError(f"{kind}_shape", f"{name} has {numbers.size} numbers, not one")
    number = float(numbers[0])
    if not np.isfinite(number) or abs(number - round(number)) > TOLERANCE:
        raise StructureError(f"bad_{kind}", f"{name} is {number}, not a whole number")
    if abs(number) > MAX_WHOLE:
        raise StructureError(f"bad_{kind}", f"{name} is {number:g}, beyond {MAX_WHOLE}")
    return round(number)
