"""Measurement of a step's time and memory, the same for both sides."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


def step_seconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` calls, after one that warms up."""
    step()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


def peak_megabytes(step: Callable[[], object]) -> float:
    """Return the peak memory that a step needs beyond that held before it, after one that warms up, MB."""
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    return (status("VmHWM") - before) / 1e3


def status(key: str) -> float:
    """Return a field of the process's memory status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key)))


def hand_over(seconds: dict[str, list[float]]) -> None:
    """Print the measurements for the parent process."""
    sys.stdout.write("\nSECONDS " + json.dumps(seconds) + "\n")
