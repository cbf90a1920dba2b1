"""The steps that a node takes before it takes part in a job: with a time limit, and with a record of the result."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hydrazero.launch.node.records import BY_SHELL, PASSED, UNFIT, add_event
from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.launcher_variables import node_name
from hydrazero.shards.text.foreign_text import echo

PASSES = 3
"""Number of times that folders are removed at a SIGTERM, since a step may still be writing to them."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step on a node."""

    what: str
    """Name of the step, for the message '{what} has not ended'."""
    do: Callable[[], None]
    """Function that takes the step; it raises HydrazeroError if the node cannot take part."""


def node_address() -> str:
    """Return the address at which ssh reached this node, which a hostfile may contain; empty without ssh."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else ""


def end_with_steps(attempt: Path, part: str, within: float, steps: Sequence[Step], made: Sequence[Path] = ()) -> None:
    """Take the steps, write a record to `attempt` and end the process.

    The exit status is 1, with a sentence, if the node cannot take part. `part` is the name of the steps together,
    `within` their time limit in seconds; folders in `made` are removed at a SIGTERM.
    """

    def clean(number: int, frame: FrameType | None) -> None:
        for _ in range(PASSES):
            for folder in made:
                shutil.rmtree(folder, ignore_errors=True)
        os._exit(BY_SHELL + number)

    signal.signal(signal.SIGTERM, clean)
    try:
        _take(steps, within)
        _record(attempt, PASSED, part=part)
    except HydrazeroError as error:
        _refuse(attempt, str(error))
    except Exception as error:
        traceback.print_exc()
        _refuse(attempt, f"{type(error).__name__}: {error}")
    _end(0)


def _refuse(attempt: Path, reason: str) -> None:
    echo(f"Error: node {node_name()} cannot take part: {reason}", err=True)
    with contextlib.suppress(ConfigError):  # the script also names nodes without a record
        _record(attempt, UNFIT, reason=reason.rstrip("."))
    _end(1)


def _take(steps: Sequence[Step], within: float) -> None:
    """Take the steps in a thread, which is abandoned at the time limit; raise their errors, or ConfigError then."""
    doing: list[str] = []
    raised: list[Exception] = []

    def take() -> None:
        try:
            for step in steps:
                doing.append(step.what)
                step.do()
        except Exception as error:  # raised again below
            raised.append(error)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(within)
    if raised:
        raise raised[0]
    if thread.is_alive():
        raise ConfigError(f"{doing[-1]} has not ended within {within:g} s.")


def _record(attempt: Path, event: str, **facts: object) -> None:
    try:
        add_event(attempt, node_name(), event, address=node_address(), **facts)
    except OSError as error:
        raise ConfigError(f"it cannot write to {attempt} ({error.strerror}).") from error


def _end(status: int) -> None:
    """End the process without waiting for a step that hangs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
