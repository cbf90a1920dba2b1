"""A change of a setting at a resume, as `run.json` records it; without imports of PyTorch, since reports show it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SettingChange:
    """A setting that has another value when a run is resumed."""

    key: str
    """The key, with dots."""
    old: Any
    """Value before; None if there was none."""
    new: Any
    """Value from now on; None if there is none."""

    def __str__(self) -> str:
        return f"{self.key} {shown_value(self.old)} → {shown_value(self.new)}"


def shown_value(value: Any) -> str:
    """Return a value of a setting as text."""
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
