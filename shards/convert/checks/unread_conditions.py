"""Fields of frames that look like a total charge or a spin, but are not read as such."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from hydrazero.shards.conditions import condition_named
from hydrazero.shards.convert.checks.misspelt import is_misspelt
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.structure import Structure

MOST_VALUES = 50
"""Number of different values that are counted of a field."""
SHOWN_VALUES, LONGEST_VALUE = 5, 40
MEANINGLESS = {"charge": [{"0"}], "multiplicity": [{"0"}, {"1"}]}
"""Kind -> values of neutral structures and singlets; a field that has nothing else loses nothing."""
SUM = "initial_charges"
"""Field with the sum of ASE's initial charges, which [fields] cannot name."""

Counts = dict[str, dict[str, dict[str, int]]]
"""'charge' or 'multiplicity' -> name of the field -> value -> number of frames."""


class UnreadConditions:
    """Numbers of frames by the values of fields that look like a charge or a spin and were not read."""

    def __init__(self, counts: Counts | None = None) -> None:
        """Start with the given counts."""
        self.counts: Counts = counts or {}

    def add(self, info: Mapping[str, Any], structure: Structure, settings: ConvertSettings) -> None:
        """Count a frame, unless it has what is read, or the settings leave it out."""
        read = {"charge": structure.charge, "multiplicity": structure.multiplicity}
        for name, value in info.items():
            kind = _kind(name.rpartition(".")[2], value) if isinstance(name, str) else None  # in nested objects
            if kind is None:
                continue
            chosen = settings.columns.get(kind, getattr(settings.fields, kind))
            # The value 0 stands for a neutral structure and for one whose charge was not given.
            if chosen and not read[kind] and name != chosen and (text := _text(value)):
                self._add(kind, name, text, 1)

    def merge(self, other: UnreadConditions) -> None:
        """Add the counts of other frames."""
        for kind, names in other.counts.items():
            for name, values in names.items():
                for value, count in values.items():
                    self._add(kind, name, value, count)

    def _add(self, kind: str, name: str, value: str, count: int) -> None:
        values = self.counts.setdefault(kind, {}).setdefault(name, {})
        if value in values or len(values) < MOST_VALUES:
            values[value] = values.get(value, 0) + count

    def warnings(self) -> list[str]:
        """Return a sentence for each field whose values are not all those of neutral structures or singlets."""
        return [
            _sentence(kind, name, values)
            for kind, names in sorted(self.counts.items())
            for name, values in sorted(names.items())
            if set(values) not in MEANINGLESS[kind]
        ]


def _kind(name: str, value: Any) -> str | None:
    """Return whether a field is named, or probably meant, as a charge or a multiplicity; None for neither."""
    if (kind := condition_named(name)) is not None:
        return kind
    meant = next((kind for kind in MEANINGLESS if is_misspelt(name, kind)), None)
    return meant if meant and re.fullmatch(r"-?\d{1,2}", _text(value)) else None


def _sentence(kind: str, name: str, values: Mapping[str, int]) -> str:
    shown = [f"{value} in {count:,}" for value, count in sorted(values.items())[:SHOWN_VALUES]]
    more = ["..."] if len(values) > SHOWN_VALUES else []
    counts = f"({', '.join([*shown, *more])} frames)"
    if name == SUM:
        return (
            f"the initial charges of atoms add up to a total charge {counts}, which is not read: structures "
            "without a field 'charge' count as neutral; write the total charge into atoms.info['charge'] if it is one."
        )
    if kind == "charge":
        return (
            f"the field '{name}' looks like the total charge {counts}, but is not read, so that all these structures "
            f'count as neutral; [fields] charge = "{name}" reads it, and charge = "" leaves it out.'
        )
    return (
        f"the field '{name}' looks like the spin {counts}, but is not read, so that the spin of these structures is "
        f'unknown; [fields] multiplicity = "{name}" reads it if it is the multiplicity 2S+1, and multiplicity = "" '
        "leaves it out."
    )


def _text(value: Any) -> str:
    """Return one number or a short text as text; an empty one for anything else, such as numbers of atoms and NaN."""
    if isinstance(value, str | bytes):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        try:
            value = float(text)
        except ValueError:
            return text.strip()[:LONGEST_VALUE]
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return ""
    if array.size != 1 or np.isnan(array).any():
        return ""
    return f"{round(float(array.reshape(-1)[0]), 6) + 0.0:g}"  # charges may miss a whole number by rounding
