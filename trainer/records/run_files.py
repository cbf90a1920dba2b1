"""The files of a run folder: their names, and how they are read and written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json, read_json_lines, without_links, write_text
from hydrazero.trainer.records.file_shapes import EVALUATION_NAME, MODEL_FACTS_NAME, RUN_NAME, SHAPES, MetricsRow

METRICS_NAME = "metrics.jsonl"
PREDICTIONS = "predictions"
"""Folder of files TASK.parquet with one row for each structure of the evaluated split."""
REPORT_NAME = "report.html"

__all__ = [
    "EVALUATION_NAME",
    "METRICS_NAME",
    "MODEL_FACTS_NAME",
    "PREDICTIONS",
    "REPORT_NAME",
    "RUN_NAME",
    "MetricsWriter",
    "read_metrics",
    "read_run_json",
    "truncate_metrics",
    "writing",
]


def writing(run_dir: Path, write: Callable[[], None]) -> None:
    """Call a function that writes to a run folder; raise ConfigError if it cannot write."""
    try:
        write()
    except OSError as error:
        raise ConfigError(
            f"run folder {run_dir} cannot be written ({error.strerror}); free some space there, or set run.out."
        ) from error


def read_run_json(run_dir: Path, name: str) -> Any:
    """Return the content of a JSON file of a run folder; raise ConfigError if it is missing, damaged, or another one.

    What the readers of a file rely on is checked, see `SHAPES`.
    """
    return read_json(run_dir / name, shape=SHAPES.get(name, Any), hint=f"check that {run_dir} is a run folder")


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
            with open(self.path, "ab", buffering=0, opener=without_links) as file:
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
    return read_json_lines(path, shape=MetricsRow) if path.is_file() else []


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Remove the rows after `step`, since a resumed run does those steps again."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(run_dir) if row["step"] <= step]
    write_text(run_dir / METRICS_NAME, "".join(kept))
