"""Where a screen's rows go: a folder of parts, or one file that is made of them at the end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hydrazero.models.screening.parts import Best, ChunkNote, note_of, write_part
from hydrazero.models.screening.settings import CHUNK, ScreenSettings
from hydrazero.shards.errors import ConfigError, SourceError
from hydrazero.shards.files import locked, replacing, try_lock, write_bytes, write_json

RECORD_NAME, SUMMARY_NAME = "_screen.json", "_summary.json"
"""Names that begin like this are passed over by what reads a folder of parquet files as one table."""
DONE = "_done-"
"""Beginning of the names of files that ranks leave when they have done their share."""
SCREEN = b"hydrazero.screened"
TOP_NAME, PARTS = "top.parquet", "part-*.parquet"
AT_ONCE = 64
"""Chunks that become one row group of a file."""
OPEN_AT_ONCE = 64
"""Parts that are held open while a file is made of them."""
SUFFIX = ".parquet"
OTHER_FILES = {".arrow", ".csv", ".db", ".extxyz", ".feather", ".h5", ".hdf5", ".json", ".npz", ".pq", ".txt", ".xyz"}
"""Suffixes of what is no folder for sure."""


class Output:
    """Where a screen's rows go: a folder of parts, or a file that is made of parts at the end."""

    def __init__(self, out: Path) -> None:
        """Raise ConfigError for the name of another kind of file."""
        if out.suffix.lower() in OTHER_FILES:
            raise ConfigError(f"{out}: rows are written as Parquet; name {out.with_suffix(SUFFIX)}, or a folder.")
        self.out = out
        self.one_file = out.suffix == SUFFIX
        self.parts = out.with_name(f".{out.name}.parts") if self.one_file else out
        self._screen = ""

    def begin(self, record: dict[str, Any], ranks: int) -> bool:
        """Make the folder of parts, or go on with one of the same model, sources and settings.

        Of several ranks, one that is late finds that the same screen is complete, and gets False. Raises SourceError if
        `out` is there otherwise, or was begun with something else.
        """
        self._screen = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if (before := self._finished()) is not None:
                self._tidy()
                if ranks > 1 and before == self._screen:
                    return False
                what = "holds a screen that is complete" if self.out.is_dir() else "exists"
                raise SourceError(f"{self.out} {what}; remove it or choose another name.")
            if self.out.is_file():
                raise SourceError(f"{self.out} is a file; name a file that ends in .parquet, or a new folder.")
            file = self.parts / RECORD_NAME
            if file.exists():
                self._check_same(record, json.loads(file.read_text(encoding="utf-8")))
                return True
            if self.parts.is_dir() and any(self.parts.iterdir()):
                raise SourceError(f"{self.parts} exists and is no unfinished screen; remove it or choose another name.")
            self.parts.mkdir(exist_ok=True)
            write_json(file, record, shared=True)
        return True

    def _finished(self) -> str | None:
        """Return which screen has made the result, None if there is none yet."""
        if self.one_file:
            if not self.out.is_file():
                return None
            try:
                return (pq.read_schema(self.out).metadata or {}).get(SCREEN, b"").decode()
            except pa.ArrowException:
                return ""
        summary = self.summary()
        return None if summary is None else str(summary.get("screen", ""))

    @contextmanager
    def working(self, rank: int, ranks: int) -> Iterator[None]:
        """Keep others from doing the same work meanwhile; raises SourceError if another process is at it."""
        path = self.out.with_name(f".{self.out.name}.rank-{rank}-of-{ranks}.lock")
        lock = try_lock(path)
        if lock is None:
            raise SourceError(
                f"another process is at work on {self.out} as rank {rank} of {ranks}; wait for it, or stop it."
            )
        with lock:
            yield
            path.unlink(missing_ok=True)

    def _check_same(self, record: dict[str, Any], there: dict[str, Any]) -> None:
        other = [key for key in record if record[key] != there.get(key)]
        if "settings" in other:
            before = there.get("settings", {})
            changed = [key for key, value in record["settings"].items() if value != before.get(key)]
            other[other.index("settings")] = f"settings ({', '.join(changed)})"
        if other:
            raise SourceError(
                f"{self.parts} holds an unfinished screen with other {' and '.join(other)}; give the same ones to go "
                "on with it, or remove it."
            )

    def notes(self) -> dict[Path, dict[int, ChunkNote]]:
        """Read what all parts say of themselves."""
        return {path: note_of(path) for path in sorted(self.parts.glob(PARTS))}

    def summary(self) -> dict[str, Any] | None:
        """Return what `finish` has written into a folder."""
        file = self.parts / SUMMARY_NAME
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finish(self, total: int, settings: ScreenSettings, rank: int, ranks: int) -> dict[str, Any] | None:
        """Make the result of all parts, if this rank is the last; returns the summary.

        Raises SourceError if there was no structure, or if the parts do not hold as many as the sources.
        """
        try:
            write_bytes(self.parts / f"{DONE}{rank}-of-{ranks}", b"", shared=True)
        except FileNotFoundError:
            return None  # another start has made a file of the parts
        if len(list(self.parts.glob(f"{DONE}*-of-{ranks}"))) < ranks:
            return None
        with self._alone():
            if not self.parts.is_dir():
                return None
            if self._finished() is not None:
                self._tidy()
                if settings.top is None:
                    self._drop_repeats(self.notes())
                return None
            notes = self.notes()
            chunks = {chunk: note for found in notes.values() for chunk, note in found.items()}
            if total == 0:
                shutil.rmtree(self.parts)
                raise SourceError("the sources hold no structure; there is nothing to screen.")
            self._check_whole(chunks, total)
            refused: Counter[str] = sum((note.refused for note in chunks.values()), Counter())
            written = self._merge(notes, settings, total)
            summary = {"structures": total, "written": written, "refused": dict(refused)}
            if self.one_file:
                shutil.rmtree(self.parts)
            else:
                write_json(self.parts / SUMMARY_NAME, {**summary, "screen": self._screen}, shared=True)
                self._tidy()
            return summary

    def _tidy(self) -> None:
        """Leave in the folder of a complete screen nothing but the result."""
        leftovers = [f"{DONE}*", ".part-*"]  # the latter of ranks that were killed while they wrote
        if (self.parts / TOP_NAME).exists():
            leftovers.append(PARTS)
        for pattern in leftovers:
            for left in self.parts.glob(pattern):
                left.unlink()

    def _drop_repeats(self, notes: dict[Path, dict[int, ChunkNote]]) -> None:
        """Leave each chunk in one part: starts with different numbers of ranks may have done the same ones."""
        seen: set[int] = set()
        for path, found in notes.items():
            kept = {chunk: note for chunk, note in found.items() if chunk not in seen}
            seen |= kept.keys()
            if not kept:
                path.unlink()
            elif len(kept) < len(found):
                table = pq.read_table(path)
                mine = np.isin(table["index"].to_numpy() // CHUNK, list(kept))
                write_part(path, [table.filter(pa.array(mine))], kept)

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

    def _alone(self) -> AbstractContextManager[None]:
        """Wait until no other rank is at it; the lock ends with its process."""
        return locked(self.out.with_name(f".{self.out.name}.lock"), remove=True)

    def _merge(self, notes: dict[Path, dict[int, ChunkNote]], settings: ScreenSettings, total: int) -> int:
        """Write what is to stay of all `total` structures; returns its rows."""
        if settings.top is not None:
            best = Best(settings, pq.read_schema(next(iter(notes))))
            for path in notes:
                best.add(pq.read_table(path).replace_schema_metadata(None))
            return self._write_tables(self.out if self.one_file else self.out / TOP_NAME, iter([best.table()]))
        if self.one_file:
            return self._write_tables(self.out, _in_order(notes))
        self._drop_repeats(notes)
        return total

    def _write_tables(self, path: Path, tables: Iterator[pa.Table]) -> int:
        """Write tables of one schema to a file, which appears when it is whole; returns the number of rows."""
        rows, writer = 0, None
        with replacing(path, shared=True) as part:
            for table in tables:
                table = table.replace_schema_metadata({SCREEN: self._screen.encode()})
                writer = writer or pq.ParquetWriter(part, table.schema)
                writer.write_table(table)
                rows += table.num_rows
            if writer is not None:
                writer.close()
        return rows


def _in_order(notes: dict[Path, dict[int, ChunkNote]]) -> Iterator[pa.Table]:
    """Yield the rows of all chunks in the order of the sources; each is a row group of its part."""
    owner = {chunk: (path, place) for path, found in notes.items() for place, chunk in enumerate(found)}
    opened = lru_cache(maxsize=OPEN_AT_ONCE)(pq.ParquetFile)
    waiting: list[pa.Table] = []
    for _, (path, place) in sorted(owner.items()):
        waiting.append(opened(path).read_row_group(place))
        if len(waiting) == AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
