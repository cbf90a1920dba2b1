"""Names under which other programs store the total charge and the spin of a structure."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

OTHER_NAMES = {
    "charge": (
        *("total_charge", "totalcharge", "tot_charge", "net_charge", "netcharge", "molecular_charge", "mol_charge"),
        *("molcharge", "system_charge", "cell_charge", "formal_charge", "q_total", "qtot", "initial_charges"),
    ),
    "multiplicity": (
        *("spin_multiplicity", "spinmultiplicity", "spin_mult", "mult", "spin", "total_spin", "unpaired_electrons"),
        *("n_unpaired", "nunpaired"),
    ),
}
"""Names, in small letters, under which other programs store charge and spin, not always in the same convention."""
PREFIXES = ("ref_", "dft_", "qm_")
"""What may stand in front of such a name."""


def condition_named(name: Any) -> str | None:
    """Return 'charge' or 'multiplicity' if a field has a name for it, in capital or small letters; None otherwise."""
    return _condition(name) if isinstance(name, str) else None


@lru_cache(maxsize=4096)
def _condition(name: str) -> str | None:
    plain = name.lower()
    for prefix in PREFIXES:
        plain = plain.removeprefix(prefix)
    return next((kind for kind, others in OTHER_NAMES.items() if plain == kind or plain in others), None)


def is_set(value: Any) -> bool:
    """Return whether a value is there and is not zero."""
    if value is None:
        return False
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return bool(str(value).strip())
    return bool((np.nan_to_num(numbers) != 0).any())
