"""Fields of frames that look like a stress or virial, in frames that get no stress."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from hydrazero.shards.convert.checks.misspelt import is_misspelt
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.structure import Structure

NAMES = re.compile(r"(ref_|dft_|qm_)?(virials?|stress(es)?|stress_tensor)", re.IGNORECASE)
SIZES = (6, 9)


class UnreadStress:
    """Numbers of frames by the names of fields that look like a stress or virial and were not read."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        """Start with the given counts."""
        self.counts = Counter(counts or {})

    def add(self, info: Mapping[str, Any], structure: Structure, settings: ConvertSettings) -> None:
        """Count a periodic frame without a stress, unless the settings leave the stress out."""
        if structure.stress is not None or not settings.fields.stress or not structure.volume:
            return
        read = {settings.columns.get(label, getattr(settings.fields, label)) for label in ("stress", "virial")}
        for name, value in info.items():
            if isinstance(name, str) and name not in read and _is_stress(name) and _has_numbers(value):
                self.counts[name] += 1

    def merge(self, other: UnreadStress) -> None:
        """Add the counts of other frames."""
        self.counts.update(other.counts)

    def warnings(self) -> list[str]:
        """Return a sentence for each such field."""
        return [
            f"{count:,} structures have a field '{name}', which is not read, and no stress; [fields] "
            f'{"virial" if _is_virial(name) else "stress"} = "{name}" reads it, and stress = "" leaves the '
            "stress out."
            for name, count in sorted(self.counts.items())
        ]


def _is_stress(name: str) -> bool:
    return NAMES.fullmatch(name) is not None or any(is_misspelt(name, meant) for meant in ("stress", "virial"))


def _is_virial(name: str) -> bool:
    return "virial" in name.lower() or is_misspelt(name, "virial")


def _has_numbers(value: Any) -> bool:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return array.size in SIZES and not np.isnan(array).all()
