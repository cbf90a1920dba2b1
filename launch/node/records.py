"""What the ranks of a job leave behind: a file per node, a line per event."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTEMPTS = "attempt-*"
"""Folders of a job's tries, in the launch folder of a run, in order."""
LAUNCH = "launch"
"""Folder in a run's folder with the job script, the output of jobs and the tries."""
JOB_NAME = "job.json"
"""In the folder of a try: which job it was."""
VERDICT_NAME = "verdict.json"
"""In the folder of a try: how it ended."""
TOLD_NAME = "told"
"""In the folder of a try: the signals that its job was sent, USR1 or TERM."""
RECORDS = ".jsonl"
PASSED, UNFIT = "passed", "unfit"
"""Events of a node before ranks start: it has done a part of what it must, or cannot take part."""
BY_SHELL = 128
"""A shell's exit status for a command that a signal has killed is this and the signal's number."""
SIGN_EVERY = 10.0
"""Seconds between the signs of life of a node: its file's time of change."""


def add_event(folder: Path, node: str, event: str, **facts: Any) -> None:
    """Add a line to a node's file, in one piece, however many ranks of the node do so."""
    line = json.dumps({"event": event, "time": time.time(), "node": node, **facts}) + "\n"
    descriptor = os.open(folder / f"{node}{RECORDS}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@dataclass(kw_only=True)
class RankLife:
    """A rank of a try, as far as it is known."""

    rank: int
    node: str
    began: float
    """Seconds since 1970, as are all times here."""
    last_sign: float
    """When its node was last seen alive."""
    ended: float | None = None
    """None if nobody was left to note it."""
    status: int | None = None
    """Exit status, or minus the signal that killed it."""
    told: tuple[str, ...] = ()
    """Signals that it was sent by the job or the launcher."""
    tail: tuple[str, ...] = ()
    """The last lines that it printed, if it ended badly."""


@dataclass(frozen=True, kw_only=True)
class TryRecords:
    """All that a try has left."""

    ranks: tuple[RankLife, ...]
    """In order."""
    expected: int
    """Ranks that there should have been; 0 if none has started."""
    unfit: tuple[tuple[str, str], ...]
    """Nodes that did not pass the check, and why."""
    told: tuple[str, ...] = ()
    """Signals that the job itself was sent."""


def read_try(folder: Path) -> TryRecords:
    """Read the records of a try; a last line that was cut off is left out."""
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
                _note(life, row)
    ranks = tuple(lives[rank] for rank in sorted(lives))
    return TryRecords(ranks=ranks, expected=expected, unfit=tuple(unfit), told=_told(folder))


def _told(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(f"SIG{name}" for name in (folder / TOLD_NAME).read_text(encoding="utf-8").split())
    except OSError:
        return ()


def events_of(folder: Path, node: str) -> list[dict[str, Any]]:
    """Read what a node has noted so far."""
    return _rows(folder / f"{node}{RECORDS}")


def all_events(folder: Path) -> list[dict[str, Any]]:
    """Read what all nodes have noted so far."""
    return [row for path in sorted(folder.glob(f"*{RECORDS}")) for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _note(life: RankLife, row: dict[str, Any]) -> None:
    if row["event"] == "told":
        life.told = (*life.told, row["signal"])
    elif row["event"] == "end":
        life.ended, life.status, life.tail = row["time"], row["status"], tuple(row.get("tail", ()))
