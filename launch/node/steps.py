"""What a node does before it takes part: a step at a time, within some seconds, and noted, so that it can be named."""

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

import click

from hydrazero.launch.node.records import BY_SHELL, PASSED, UNFIT, add_event
from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.launcher_variables import node_name

PASSES = 3
"""Times that folders are removed at a SIGTERM: a step may still write there, until it finds no folder any more."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to do on a node."""

    what: str
    """It hangs: '{what} has not ended'."""
    do: Callable[[], None]
    """Raises HydrazeroError if the node cannot take part."""


def node_address() -> str:
    """Address by which this node was reached through ssh, empty if it was not: a hostfile may call it so."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else ""


def end_with_steps(attempt: Path, part: str, within: float, steps: Sequence[Step], made: Sequence[Path] = ()) -> None:
    """Take the steps, leave a note in `attempt` and end the process; with status 1 and a sentence if the node is unfit.

    `part` names the steps together; `within` is in seconds; folders that are `made` go again at a SIGTERM.
    """

    def clean(number: int, frame: FrameType | None) -> None:
        for _ in range(PASSES):
            for folder in made:
                shutil.rmtree(folder, ignore_errors=True)
        os._exit(BY_SHELL + number)

    signal.signal(signal.SIGTERM, clean)
    try:
        _take(steps, within)
        _note(attempt, PASSED, part=part)
    except HydrazeroError as error:
        _refuse(attempt, str(error))
    except Exception as error:
        traceback.print_exc()
        _refuse(attempt, f"{type(error).__name__}: {error}")
    _end(0)


def _refuse(attempt: Path, reason: str) -> None:
    click.echo(f"Error: node {node_name()} is not fit: {reason}", err=True)
    with contextlib.suppress(ConfigError):  # the script names a node without a note, too
        _note(attempt, UNFIT, reason=reason.rstrip("."))
    _end(1)


def _take(steps: Sequence[Step], within: float) -> None:
    """Take steps in a thread, which is left alone if it hangs; raises what they raise, ConfigError if one is late."""
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


def _note(attempt: Path, event: str, **facts: object) -> None:
    try:
        add_event(attempt, node_name(), event, address=node_address(), **facts)
    except OSError as error:
        raise ConfigError(f"{attempt} cannot be written from it ({error.strerror}).") from error


def _end(status: int) -> None:
    """End without waiting for a step that hangs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
