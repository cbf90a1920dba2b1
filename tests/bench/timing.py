"""Timing of a step, the same for both sides."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable


def step_seconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that warms up."""
    step()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


def hand_over(seconds: dict[str, list[float]]) -> None:
    """Give the times to the parent process."""
    sys.stdout.write("\nSECONDS " + json.dumps(seconds) + "\n")
