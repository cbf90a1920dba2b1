"""Names of the parts of a structure in a source of named columns or keys."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from hydrazero.shards.readers.frames import ReadSettings
from hydrazero.shards.text.foreign_text import escaped

LABELS = ("energy", "forces", "stress", "virial", "charge", "multiplicity")


def column_names(settings: ReadSettings) -> dict[str, str]:
    """Return part of a structure -> name in the source.

    The name is that of [columns], otherwise that of [fields], otherwise that of the part. Fields of targets are
    included; labels whose name is empty in [fields] are not.
    """
    names = {target.field: target.field for target in settings.targets.values()}
    names |= {part: part for part in ("numbers", "positions", "cell", "pbc")}
    names |= {label: getattr(settings.fields, label) for label in LABELS if getattr(settings.fields, label)}
    return names | dict(settings.columns)


def listed(names: Iterable[object], most: int = 20) -> str:
    """Return names of a file for a sentence: the first of them, and how many more there are."""
    every = iter(names)
    first = [escaped(name)[:60] for name in islice(every, most)]
    more = sum(1 for _ in every)
    return ", ".join([*first, f"and {more:,} more"] if more else first)
