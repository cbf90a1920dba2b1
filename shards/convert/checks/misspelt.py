"""Names of fields that are probably misspelt."""

from __future__ import annotations

from difflib import SequenceMatcher
from functools import lru_cache

SIMILAR = 0.8
"""Ratio of difflib from which a name is a misspelling of another."""
WORDS = {"change", "changed", "charged", "charger", "charges", "large", "range", "stressed"}
"""Names that are similar to one of a label, but are words of their own."""


@lru_cache(maxsize=4096)  # frames repeat their fields
def is_misspelt(name: str, meant: str) -> bool:
    """Return whether a name is another one with letters exchanged, left out or added, in any case of letters."""
    plain = name.lower()
    if plain == meant or plain in WORDS or abs(len(plain) - len(meant)) > 2:
        return False
    return sorted(plain) == sorted(meant) or SequenceMatcher(None, plain, meant).ratio() >= SIMILAR
