"""Fields of frames that name the method of the labels, of which a task should have one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "xc",
    "functional",
    "xc_functional",
    "dft_functional",
    "method",
    "theory",
    "level_of_theory",
    "theory_level",
    "fidelity",
    "basis",
    "basis_set",
}
"""Names of such fields, in small letters."""
MOST_VALUES = 50
"""Number of values from which on a field is taken for something else."""
SHOWN_VALUES, LONGEST_VALUE = 5, 40


class MethodFields:
    """Numbers of frames by the values of fields that name a method."""

    def __init__(self, counts: dict[str, dict[str, int]] | None = None) -> None:
        """Start with the given counts: name of the field -> value -> number of frames."""
        self.counts: dict[str, dict[str, int]] = counts or {}

    def add(self, info: Mapping[str, Any]) -> None:
        """Count a frame."""
        for key, value in info.items():
            if isinstance(key, str) and key.lower() in NAMES and isinstance(value, str) and len(value) <= LONGEST_VALUE:
                self._add(key, value, 1)

    def merge(self, other: MethodFields) -> None:
        """Add the counts of other frames."""
        for key, values in other.counts.items():
            for value, count in values.items():
                self._add(key, value, count)

    def _add(self, key: str, value: str, count: int) -> None:
        values = self.counts.setdefault(key, {})
        if value in values or len(values) < MOST_VALUES:
            values[value] = values.get(value, 0) + count

    def warnings(self) -> list[str]:
        """Return a sentence for each field that has several values."""
        found = []
        for key, values in sorted(self.counts.items()):
            if 1 < len(values) < MOST_VALUES:
                shown = [f"{value} {count:,}" for value, count in sorted(values.items())[:SHOWN_VALUES]]
                more = [f"{len(values) - SHOWN_VALUES} others"] if len(values) > SHOWN_VALUES else []
                found.append(
                    f"the frames have {len(values)} values of the field '{key}' ({', '.join([*shown, *more])}); "
                    "convert the labels of each method as a task of its own, with [select]."
                )
        return found
