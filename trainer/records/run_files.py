"""The files of a run folder: their names, and how they are read and written."""

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
"""File with the settings, versions, command and start of the run."""
MODEL_FACTS_NAME = "model.json"
"""File with the settings of the model and the facts of its tasks."""
METRICS_NAME = "metrics.jsonl"
EVALUATION_NAME = "evaluation.json"
PREDICTIONS = "predictions"
"""Folder of files TASK.parquet with one row for each structure of the evaluated split."""
REPORT_NAME = "report.html"


def writing(run_dir: Path, write: Callable[[], None]) -> None:
    """Call a function that writes to a run folder; raise ConfigError if it cannot write."""
    try:
        write()
    except OSError as error:
        raise ConfigError(
            f"run folder {run_dir} cannot be written ({error.strerror}); free some space there, or set run.out."
        ) from error


def read_run_json(run_dir: Path, name: str) -> Any:
    """Return the content of a JSON file of a run folder; raise ConfigError if it is missing or damaged."""
    return read_json(run_dir / name, hint=f"check that {run_dir} is a run folder")


class MetricsWriter:
    """Writer of metrics.jsonl, which keeps lines in memory while the disk is full."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_NAME
        self._waiting: list[bytes] = []

    def append(self, row: dict[str, Any]) -> str | None:
        """Add a row; return why it or an earlier row could not be written yet, or None if all have been."""
        self._waiting.append((json.dumps(row) + "\n").encode())
        try:
            # Unbuffered: a buffer would try to write again when the file is closed.
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
    """Return the rows of metrics.jsonl; raise ConfigError for a damaged line, unless it is an incomplete last one."""
    path = run_dir / METRICS_NAME
    if not path.is_file():
        return []
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text in UTF-8 ({error.reason} at byte {error.start}).") from error
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
    """Remove the rows after `step`, since a resumed run does those steps again."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(run_dir) if row["step"] <= step]
    write_text(run_dir / METRICS_NAME, "".join(kept))
