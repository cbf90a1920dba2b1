"""Files of a run folder: their names, and reading and writing of them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json, write_text

RUN_NAME = "run.json"
"""Resolved configuration, versions, command, start."""
MODEL_FACTS_NAME = "model.json"
"""Settings of the model and facts of its tasks."""
METRICS_NAME = "metrics.jsonl"
EVALUATION_NAME = "evaluation.json"
PREDICTIONS = "predictions"
"""Folder of TASK.parquet, a row per structure of the evaluated split."""
REPORT_NAME = "report.html"


def writing(run_dir: Path, write: Callable[[], None]) -> None:
    """Write to a run's folder; raises ConfigError where that is not possible."""
    try:
        write()
    except OSError as error:
        raise ConfigError(
            f"run folder {run_dir} cannot be written ({error.strerror}); make room there, or set run.out."
        ) from error


def read_run_json(run_dir: Path, name: str) -> Any:
    """Return the content of a JSON file of a run folder; raise ConfigError if it is missing or damaged."""
    return read_json(run_dir / name, hint=f"check that {run_dir} is a run folder")


class MetricsWriter:
    """Adds lines to metrics.jsonl, and keeps those for which the disk has no room until it has."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_NAME
        self._waiting: list[bytes] = []

    def append(self, row: dict[str, Any]) -> str | None:
        """Add a row; returns why it, or one before it, could not be written yet, None if all are."""
        self._waiting.append((json.dumps(row) + "\n").encode())
        try:
            # Unbuffered: what a buffer could not write it would try again when the file is closed.
            with open(self.path, "ab", buffering=0) as file:
                while self._waiting:
                    end = file.tell()
                    if file.write(self._waiting[0]) < len(self._waiting[0]):
                        file.truncate(end)  # half a line would make the file unreadable
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    del self._waiting[0]
        except OSError as error:
            return error.strerror
        return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; raises ConfigError naming a damaged line, except a last one cut short by a kill."""
    path = run_dir / METRICS_NAME
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # without its line end: the writer was killed, or is writing
                break
            raise ConfigError(f"{path}, line {number}, is not valid JSON ({error}).") from error
    return rows


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Leave out what was logged after `step`: a resumed run does those steps again."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(run_dir) if row["step"] <= step]
    write_text(run_dir / METRICS_NAME, "".join(kept))
