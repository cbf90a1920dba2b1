"""The records that the ranks of a job leave: a file per node, with a line per event."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import parse_json

ATTEMPTS = "attempt-*"
"""Folders of a job's attempts in the launch folder of a run; their names sort in order."""
LAUNCH = "launch"
"""Folder in the run folder with the job script, the output of jobs and the attempts."""
JOB_NAME = "job.json"
"""File in the folder of an attempt with the number of its job."""
VERDICT_NAME = "verdict.json"
"""File in the folder of an attempt with the verdict of the post-mortem."""
SIGNALS_NAME = "told"
"""File in the folder of an attempt with the signals that its job received, USR1 or TERM."""
RECORDS = ".jsonl"
"""Suffix of the file of a node."""
PASSED, UNFIT = "passed", "unfit"
"""Events of a node before ranks start: it has done its check or its copies, or it cannot take part."""
FACTS: dict[str, dict[str, Any]] = {
    "start": {"rank": int, "ranks": int},
    "told": {"rank": int, "signal": str},
    "end": {"rank": int, "status": int},
    PASSED: {"part": str},
    UNFIT: {"reason": str},
}
"""Event -> the facts that belong to it, with their types."""
BY_SHELL = 128
"""Number that shells add to the number of a signal for the exit status of a command that it has killed."""
SIGN_EVERY = 10.0
"""Seconds between signs of life of a node, which are changes of its file's modification time."""


def add_event(folder: Path, node: str, event: str, **facts: Any) -> None:
    """Append a line to a node's file, atomically, since all ranks of the node write to it."""
    line = json.dumps({"event": event, "time": time.time(), "node": node, **facts}) + "\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # no links, and no waiting for pipes
    descriptor = os.open(folder / f"{node}{RECORDS}", flags, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@dataclass(kw_only=True)
class RankLife:
    """What is known about a rank of an attempt."""

    rank: int
    node: str
    began: float
    """Time of its start in seconds since 1970, like all times here."""
    last_sign: float
    """Time of the last sign of life of its node."""
    ended: float | None = None
    """Time of its end; None if it was not recorded."""
    status: int | None = None
    """Exit status, or minus the number of the signal that killed it; None if it was not recorded."""
    signals: tuple[str, ...] = ()
    """Signals that it received from the job or the launcher."""
    tail: tuple[str, ...] = ()
    """The last lines of its output if it failed."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecords:
    """All records of an attempt."""

    ranks: tuple[RankLife, ...]
    """The ranks that have started, by number."""
    expected: int
    """Number of ranks that should have started; 0 if none has started."""
    unfit: tuple[tuple[str, str], ...]
    """Nodes that could not take part, and the reasons."""
    signals: tuple[str, ...] = ()
    """Signals that the job itself received."""


def read_attempt(folder: Path) -> AttemptRecords:
    """Read the records of an attempt; incomplete lines are skipped."""
    lives: dict[int, RankLife] = {}
    unfit: list[tuple[str, str]] = []
    expected = 0
    for path in sorted(folder.glob(f"*{RECORDS}")):
        last_sign = path.stat().st_mtime
        for row in _rows(path):
            if row["event"] == UNFIT:
                unfit.append((row["node"], row["reason"]))
            elif row["event"] == "start":
                expected = max(expected, row["ranks"])
                lives[row["rank"]] = RankLife(
                    rank=row["rank"], node=row["node"], began=row["time"], last_sign=last_sign
                )
            elif (life := lives.get(row.get("rank", -1))) is not None:
                _add_to(life, row)
    ranks = tuple(lives[rank] for rank in sorted(lives))
    return AttemptRecords(ranks=ranks, expected=expected, unfit=tuple(unfit), signals=_signals(folder))


def _signals(folder: Path) -> tuple[str, ...]:
    if not (folder / SIGNALS_NAME).is_file():
        return ()
    try:
        return tuple(
            f"SIG{name}" for name in (folder / SIGNALS_NAME).read_text(encoding="utf-8", errors="replace").split()
        )
    except OSError:
        return ()


def events_of(folder: Path, node: str) -> list[dict[str, Any]]:
    """Return the events that a node has recorded so far."""
    return _rows(folder / f"{node}{RECORDS}")


def all_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events that all nodes have recorded so far."""
    return [row for path in sorted(folder.glob(f"*{RECORDS}")) for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if path.exists() and not path.is_file():  # a pipe would be waited for
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line, str(path))
        except ConfigError:
            continue
        if _is_event(row):
            rows.append(row)
    return rows


def _is_event(row: Any) -> bool:
    """Return whether a line holds an event with the values that its readers use; other lines are damaged."""
    if not isinstance(row, dict):
        return False
    wanted = {"event": str, "time": (int, float), "node": str, **FACTS.get(str(row.get("event")), {})}
    return all(isinstance(row.get(key), kind) for key, kind in wanted.items())


def _add_to(life: RankLife, row: dict[str, Any]) -> None:
    if row["event"] == "told":
        life.signals = (*life.signals, row["signal"])
    elif row["event"] == "end":
        life.ended, life.status, life.tail = row["time"], row["status"], tuple(row.get("tail", ()))
