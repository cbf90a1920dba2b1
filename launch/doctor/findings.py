"""Single facts for `hydrazero doctor`, found so that nothing that is broken can stop the report."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

AT_ONCE = 4
"""Number of probes that run at the same time; most of them wait for another process."""
SECONDS = 120.0
"""Time limit of a Python process that a probe starts."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    missing: str = ""
    """If something is missing: what does not work without it, and what to do; empty otherwise."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A function that finds something out, and may fail."""

    name: str
    find: Callable[[], str | Finding]
    """Returns the value, or a complete finding."""
    missing: str = ""
    """What to say if it fails; empty: the failure is only shown."""


class ProbeError(RuntimeError):
    """Something is not there or does not work; the message says why."""


def find_all(probes: list[Probe]) -> list[Finding]:
    """Run probes, several at a time; whatever one of them raises becomes its value."""
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return list(pool.map(_find, probes))


def _find(probe: Probe) -> Finding:
    try:
        found = probe.find()
    except (Exception, SystemExit) as error:
        return Finding(name=probe.name, value=_reason(error), missing=probe.missing)
    return found if isinstance(found, Finding) else Finding(name=probe.name, value=found)


def _reason(error: BaseException) -> str:
    """Return one line on an error."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, ProbeError) else f"not known ({type(error).__name__}: {text})"


def run_python(code: str) -> str:
    """Return what a Python process prints; raise ProbeError if it fails.

    A library that is broken may end the process that loads it, so that it is loaded in another one.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"does not work (no result within {SECONDS:g} s)") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ProbeError(f"does not work ({lines[-1].strip()})")
    return done.stdout.strip()


def first_line(command: list[str]) -> str:
    """Return the first line that a command prints; raise ProbeError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProbeError(f"{command[0]} does not work ({error})") from error
    lines = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode or not lines:
        raise ProbeError(f"{command[0]} does not work (exit status {done.returncode})")
    return lines[0].strip()
