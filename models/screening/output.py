"""Where a screen's rows go: a folder of parts, or one file that is made of them at the end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hydrazero.models.screening.parts import Best, PartNote, note_of
from hydrazero.models.screening.settings import CHUNK, ScreenSettings
from hydrazero.shards.errors import SourceError

RECORD_NAME, SUMMARY_NAME, LOCK_NAME = "screen.json", "summary.json", "merge.lock"
TOP_NAME = "top.parquet"
AT_ONCE = 64
"""Chunks that become one row group of a file."""


class Output:
    """Where a screen's rows go: a folder of parts, or a file that is made of parts at the end."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.one_file = out.suffix == ".parquet"
        self.parts = out.with_name(f".{out.name}.parts") if self.one_file else out

    def begin(self, record: dict[str, Any]) -> None:
        """Make the folder of parts, or go on with one of the same model, sources and settings.

        Raises SourceError if `out` is there and complete, or was begun with others.
        """
        if self.one_file and self.out.exists():
            raise SourceError(f"{self.out} exists; remove it or choose another name.")
        if self.out.is_file():
            raise SourceError(f"{self.out} is a file; name a file that ends in .parquet, or a new folder.")
        file = self.parts / RECORD_NAME
        if self.parts.is_dir() and any(self.parts.iterdir()) and not file.exists():
            raise SourceError(f"{self.parts} exists and is no unfinished screen; remove it or choose another name.")
        self.parts.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1)
        part = self.parts / f".{RECORD_NAME}.{uuid.uuid4().hex}"
        part.write_text(text, encoding="utf-8")
        try:
            os.link(part, file)  # the first rank wins, whole
        except FileExistsError:
            self._check_same(record, json.loads(file.read_text(encoding="utf-8")))
        finally:
            part.unlink()
        if self.summary() is not None:
            raise SourceError(f"{self.out} holds a screen that is complete; remove it or choose another name.")

    def _check_same(self, record: dict[str, Any], there: dict[str, Any]) -> None:
        other = [key for key in record if record[key] != there.get(key)]
        if other:
            raise SourceError(
                f"{self.parts} holds an unfinished screen with other {' and '.join(other)}; give the same ones to go "
                "on with it, or remove it."
            )

    def notes(self) -> dict[Path, PartNote]:
        """Read what all parts say of themselves."""
        return {path: note_of(path) for path in sorted(self.parts.glob("part-*.parquet"))}

    def summary(self) -> dict[str, Any] | None:
        """Return what `finish` has written into a folder."""
        file = self.parts / SUMMARY_NAME
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finish(self, total: int, settings: ScreenSettings) -> dict[str, Any] | None:
        """Make the result of all parts, if they are all there and no other rank does it; returns the summary.

        Raises SourceError if there was no structure.
        """
        with self._alone() as alone:
            if not alone or not self.parts.is_dir() or self.summary() is not None:
                return None
            notes = self.notes()
            done = set[int]().union(*(note.chunks for note in notes.values()))
            if len(done) < -(-total // CHUNK):
                return None
            if total == 0:
                shutil.rmtree(self.parts)
                raise SourceError("the sources hold no structure; there is nothing to screen.")
            refused: Counter[str] = sum((note.refused for note in notes.values()), Counter())
            structures = sum(note.structures for note in notes.values())
            written = self._merge(notes, settings)
            summary = {"structures": structures, "written": written, "refused": dict(refused)}
            if self.one_file:
                shutil.rmtree(self.parts)
            else:
                for left in self.parts.glob(".*"):  # of ranks that were killed while they wrote
                    left.unlink()
                write_aside(self.parts / SUMMARY_NAME, json.dumps(summary, indent=1).encode())
            return summary

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Wait until no other rank is at it; False if one has ended it. The lock ends with its process."""
        try:
            file = (self.parts / LOCK_NAME).open("w")
        except FileNotFoundError:  # the parts are a file by now
            yield False
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield True

    def _merge(self, notes: dict[Path, PartNote], settings: ScreenSettings) -> int:
        """Write what is to stay; returns its rows."""
        if settings.top is not None:
            tables = [pq.read_table(path).replace_schema_metadata(None) for path in notes]
            best = Best(settings, tables[0].schema)
            for table in tables:
                best.add(table)
            target = self.out if self.one_file else self.out / TOP_NAME
            return _write_tables(target, iter([best.table()]))
        if not self.one_file:
            return sum(sum(note.chunks.values()) for note in notes.values())
        return _write_tables(self.out, _in_order(notes))


def _in_order(notes: dict[Path, PartNote]) -> Iterator[pa.Table]:
    """Yield the rows of all parts in the order of the sources; parts are kept only while they have rows to give."""
    places = sorted((chunk, path) for path, note in notes.items() for chunk in note.chunks)
    begins = {
        path: dict(zip(note.chunks, np.cumsum([0, *note.chunks.values()]).tolist(), strict=False))
        for path, note in notes.items()
    }
    left = {path: len(note.chunks) for path, note in notes.items()}
    held: dict[Path, pa.Table] = {}
    waiting: list[pa.Table] = []
    for chunk, path in places:
        if path not in held:
            held[path] = pq.read_table(path)
        waiting.append(held[path].slice(begins[path][chunk], notes[path].chunks[chunk]))
        left[path] -= 1
        if not left[path]:
            del held[path]
        if len(waiting) == AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _write_tables(path: Path, tables: Iterator[pa.Table]) -> int:
    """Write tables of one schema to a file, which appears when it is whole; returns the number of rows."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    rows, writer = 0, None
    try:
        for table in tables:
            table = table.replace_schema_metadata(None)
            writer = writer or pq.ParquetWriter(part, table.schema)
            writer.write_table(table)
            rows += table.num_rows
        if writer is not None:
            writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return rows


def write_aside(path: Path, content: bytes) -> None:
    """Write a file that appears when it is whole."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, path)
