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

from hydrazero.models.screening.parts import Best, ChunkNote, note_of
from hydrazero.models.screening.settings import CHUNK, ScreenSettings
from hydrazero.shards.errors import SourceError

RECORD_NAME, SUMMARY_NAME = "_screen.json", "_summary.json"
"""Names that begin like this are passed over by what reads a folder of parquet files as one table."""
START = b"hydrazero.start"
TOP_NAME = "top.parquet"
AT_ONCE = 64
"""Chunks that become one row group of a file."""


class Output:
    """Where a screen's rows go: a folder of parts, or a file that is made of parts at the end."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.one_file = out.suffix == ".parquet"
        self.parts = out.with_name(f".{out.name}.parts") if self.one_file else out

    def begin(self, record: dict[str, Any], start: str = "") -> bool:
        """Make the folder of parts, or go on with one of the same model, sources and settings.

        `start` is what all ranks of one start have in common: one that is late finds that nothing is left to do, and
        gets False. Raises SourceError if `out` is there from another start, or was begun with something else.
        """
        if (before := self._finished_by()) is not None:
            if start and before == start:
                return False
            what = "holds a screen that is complete" if self.out.is_dir() else "exists"
            raise SourceError(f"{self.out} {what}; remove it or choose another name.")
        if self.out.is_file():
            raise SourceError(f"{self.out} is a file; name a file that ends in .parquet, or a new folder.")
        file = self.parts / RECORD_NAME
        if self.parts.is_dir() and any(self.parts.iterdir()) and not file.exists():
            raise SourceError(f"{self.parts} exists and is no unfinished screen; remove it or choose another name.")
        self.parts.mkdir(parents=True, exist_ok=True)
        part = self.out.with_name(f".{self.out.name}.{uuid.uuid4().hex}")
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        try:
            os.link(part, file)  # the first rank wins, whole
        except FileExistsError:
            self._check_same(record, json.loads(file.read_text(encoding="utf-8")))
        finally:
            part.unlink()
        return True

    def _finished_by(self) -> str | None:
        """Return which start has made the result, None if there is none yet."""
        if self.one_file:
            if not self.out.is_file():
                return None
            try:
                return (pq.read_schema(self.out).metadata or {}).get(START, b"").decode()
            except pa.ArrowException:
                return ""
        summary = self.summary()
        return None if summary is None else str(summary.get("start", ""))

    @contextmanager
    def working(self, rank: int, ranks: int) -> Iterator[None]:
        """Keep others from doing the same work meanwhile; raises SourceError if another process is at it."""
        path = self.out.with_name(f".{self.out.name}.rank-{rank}-of-{ranks}.lock")
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SourceError(
                    f"another process is at work on {self.out} as rank {rank} of {ranks}; wait for it, or stop it."
                ) from error
            yield
            path.unlink(missing_ok=True)

    def _check_same(self, record: dict[str, Any], there: dict[str, Any]) -> None:
        other = [key for key in record if record[key] != there.get(key)]
        if other:
            raise SourceError(
                f"{self.parts} holds an unfinished screen with other {' and '.join(other)}; give the same ones to go "
                "on with it, or remove it."
            )

    def notes(self) -> dict[Path, dict[int, ChunkNote]]:
        """Read what all parts say of themselves."""
        return {path: note_of(path) for path in sorted(self.parts.glob("part-*.parquet"))}

    def summary(self) -> dict[str, Any] | None:
        """Return what `finish` has written into a folder."""
        file = self.parts / SUMMARY_NAME
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finish(self, total: int, settings: ScreenSettings, start: str = "") -> dict[str, Any] | None:
        """Make the result of all parts, if they are all there and no other rank does it; returns the summary.

        Raises SourceError if there was no structure, or if the parts do not hold as many as the sources.
        """
        with self._alone():
            if not self.parts.is_dir() or self._finished_by() is not None:
                return None
            notes = self.notes()
            chunks = {chunk: note for found in notes.values() for chunk, note in found.items()}
            if len(chunks) < -(-total // CHUNK):
                return None
            if total == 0:
                shutil.rmtree(self.parts)
                raise SourceError("the sources hold no structure; there is nothing to screen.")
            self._check_whole(chunks, total)
            refused: Counter[str] = sum((note.refused for note in chunks.values()), Counter())
            written = self._merge(notes, settings, start)
            summary = {"structures": total, "written": written, "refused": dict(refused)}
            if self.one_file:
                shutil.rmtree(self.parts)
            else:
                write_aside(self.parts / SUMMARY_NAME, json.dumps({**summary, "start": start}, indent=1).encode())
                for left in self.parts.glob(".part-*"):  # of ranks that were killed while they wrote
                    left.unlink()
            return summary

    def _check_whole(self, chunks: dict[int, ChunkNote], total: int) -> None:
        """Raise SourceError unless the chunks hold just the structures that the sources do."""
        for chunk in range(-(-total // CHUNK)):
            expected = min(CHUNK, total - chunk * CHUNK)
            if chunk not in chunks or chunks[chunk].structures != expected:
                where = f"{chunk * CHUNK:,} to {chunk * CHUNK + expected - 1:,}"
                raise SourceError(
                    f"{self.parts} lacks some of the structures {where}: the sources have changed, or a rank could not "
                    "read them in full; remove it, and start again."
                )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other rank is at it; the lock ends with its process."""
        path = self.out.with_name(f".{self.out.name}.lock")
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
            if self._finished_by() is not None:  # before that somebody may wait for this very file
                path.unlink(missing_ok=True)

    def _merge(self, notes: dict[Path, dict[int, ChunkNote]], settings: ScreenSettings, start: str) -> int:
        """Write what is to stay; returns its rows."""
        if settings.top is not None:
            best = Best(settings, pq.read_schema(next(iter(notes))))
            for path in notes:
                best.add(pq.read_table(path).replace_schema_metadata(None))
            rows = _write_tables(self.out if self.one_file else self.out / TOP_NAME, iter([best.table()]), start)
            for path in notes:  # a folder holds the result alone
                path.unlink()
            return rows
        if not self.one_file:
            return sum(note.structures for found in notes.values() for note in found.values())
        return _write_tables(self.out, _in_order(notes), start)


def _in_order(notes: dict[Path, dict[int, ChunkNote]]) -> Iterator[pa.Table]:
    """Yield the rows of all chunks in the order of the sources; parts are kept only while they have rows to give."""
    owner = {chunk: path for path, found in notes.items() for chunk in found}
    places = sorted(owner.items())
    begins: dict[Path, dict[int, int]] = {}
    for path, found in notes.items():
        ends = np.cumsum([0, *(note.structures for note in found.values())]).tolist()
        begins[path] = dict(zip(found, ends, strict=False))
    left = Counter(owner.values())
    held: dict[Path, pa.Table] = {}
    waiting: list[pa.Table] = []
    for chunk, path in places:
        if path not in held:
            held[path] = pq.read_table(path)
        waiting.append(held[path].slice(begins[path][chunk], notes[path][chunk].structures))
        left[path] -= 1
        if not left[path]:
            del held[path]
        if len(waiting) == AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _write_tables(path: Path, tables: Iterator[pa.Table], start: str) -> int:
    """Write tables of one schema to a file, which appears when it is whole; returns the number of rows."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    rows, writer = 0, None
    try:
        for table in tables:
            table = table.replace_schema_metadata({START: start.encode()})
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
