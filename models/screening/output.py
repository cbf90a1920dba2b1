"""Output of a screen: a folder of parts, or one file that is merged from parts at the end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from hydrazero.models.screening.columns import with_columns
from hydrazero.models.screening.part_files import (
    ChunkRecord,
    check_part,
    damaged,
    read_chunk_records,
    read_part,
    write_part,
)
from hydrazero.models.screening.ranking import TopRows
from hydrazero.models.screening.settings import CHUNK, ScreenSettings
from hydrazero.shards.errors import ConfigError, SourceError
from hydrazero.shards.files import locked, read_json, replacing, try_lock, write_bytes, write_json

RECORD_NAME, SUMMARY_NAME = "_screen.json", "_summary.json"
"""Names that begin with an underscore are ignored by programs that read a folder of Parquet files as one table."""
RANK_DONE = "_done-"
"""Prefix of the empty files by which ranks show that they have screened their share."""
SCREEN_KEY = b"hydrazero.screened"
"""Key of a result's Parquet metadata that holds the SHA-256 of the screen's record."""
TOP_NAME, PARTS = "top.parquet", "part-*.parquet"
ROW_GROUP_CHUNKS = 64
"""Number of chunks in a row group of the merged file."""
MAX_OPEN_PARTS = 64
"""Maximum number of parts that are open at once while they are merged."""
SUFFIX = ".parquet"
OTHER_FILES = {".arrow", ".csv", ".db", ".extxyz", ".feather", ".h5", ".hdf5", ".json", ".npz", ".pq", ".txt", ".xyz"}
"""Suffixes that show that `out` was meant to be a file of another format, not a folder."""

PartRecords = dict[Path, dict[int, ChunkRecord]]
"""The chunks of each part."""


class ScreenRecord(BaseModel):
    """What is relied on of the record of an unfinished screen."""

    settings: dict[str, Any]


class ScreenOutput:
    """The files of a screen: parts while it runs, and the result at its end."""

    def __init__(self, out: Path) -> None:
        """Raise ConfigError if `out` has the suffix of another file format."""
        if out.suffix.lower() in OTHER_FILES:
            raise ConfigError(f"{out}: rows are written as Parquet; name {out.with_suffix(SUFFIX)}, or a folder.")
        self.out = out
        self.one_file = out.suffix == SUFFIX
        self.parts = out.with_name(f".{out.name}.parts") if self.one_file else out
        self._screen = ""

    def begin(self, record: dict[str, Any], ranks: int) -> bool:
        """Create the folder of parts, or resume one with the same model, sources and settings.

        Return False if the same screen is already complete, which a late rank of several may find. Raise SourceError if
        `out` exists for another reason, or if the unfinished screen has another record.
        """
        self._screen = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self._exclusive():
            if (complete := self._complete_screen()) is not None:
                self._remove_leftovers()
                if ranks > 1 and complete == self._screen:
                    return False
                state = "holds a screen that is complete" if self.out.is_dir() else "exists"
                raise SourceError(f"{self.out} {state}; remove it or choose another name.")
            if self.out.is_file():
                raise SourceError(f"{self.out} is a file; name a file that ends in .parquet, or a new folder.")
            file = self.parts / RECORD_NAME
            if file.exists():
                self._check_same(record, read_json(file, shape=ScreenRecord, hint="remove the folder to begin anew"))
                return True
            if self.parts.is_dir() and any(self.parts.iterdir()):
                raise SourceError(
                    f"{self.parts} exists, but holds no unfinished screen; remove it or choose another name."
                )
            self.parts.mkdir(exist_ok=True)
            write_json(file, record, shared=True)
        return True

    def _complete_screen(self) -> str | None:
        """Return the SHA-256 of the screen that made the result, "" if it is unknown, None if there is no result."""
        if self.one_file:
            if not self.out.is_file():
                return None
            try:
                return (pq.read_schema(self.out).metadata or {}).get(SCREEN_KEY, b"").decode()
            except pa.ArrowException:
                return ""
        summary = self.summary()
        return None if summary is None else str(summary.get("screen", ""))

    @contextmanager
    def working(self, rank: int, ranks: int) -> Iterator[None]:
        """Hold the lock of a rank's share; raise SourceError if another process works on the same share."""
        path = self.out.with_name(f".{self.out.name}.rank-{rank}-of-{ranks}.lock")
        lock = try_lock(path)
        if lock is None:
            raise SourceError(
                f"another process works on {self.out} as rank {rank} of {ranks}; wait until it has ended, or stop it."
            )
        with lock:
            yield
            path.unlink(missing_ok=True)

    def _check_same(self, record: dict[str, Any], previous: dict[str, Any]) -> None:
        """Raise SourceError, with the keys that differ, unless an unfinished screen has the same record."""
        different = [key for key in record if record[key] != previous.get(key)]
        if "settings" in different:
            before = previous.get("settings", {})
            changed = [key for key, value in record["settings"].items() if value != before.get(key)]
            different[different.index("settings")] = f"settings ({', '.join(changed)})"
        if different:
            raise SourceError(
                f"{self.parts} holds an unfinished screen with other {' and '.join(different)}; give the same ones to "
                "resume it, or remove it."
            )

    def part_records(self) -> PartRecords:
        """Return the chunks of each part, as its metadata lists them."""
        found: PartRecords = {}
        for path in sorted(self.parts.glob(PARTS)):
            with suppress(FileNotFoundError):  # another rank has replaced it by a part that holds more
                found[path] = read_chunk_records(path)
        return found

    def check_parts(self, rank: int, ranks: int) -> None:
        """Raise SourceError if the content of a part has changed since it was written; each rank checks its share."""
        for path in sorted(self.parts.glob(PARTS))[rank::ranks]:
            with suppress(FileNotFoundError):
                check_part(path)

    def summary(self) -> dict[str, Any] | None:
        """Return the summary that `finish` wrote into the folder, None if there is none."""
        file = self.parts / SUMMARY_NAME
        return read_json(file, shape=dict[str, Any]) if file.is_file() else None

    def finish(
        self, total: int, settings: ScreenSettings, schema: pa.Schema, rank: int, ranks: int
    ) -> dict[str, Any] | None:
        """Merge all parts into the result if this rank is the last one, and return the summary; otherwise return None.

        `schema` has the columns of the result; parts of earlier versions may lack some. Raises SourceError if the
        sources hold no structure, or if the parts lack some of their `total` structures.
        """
        try:
            write_bytes(self.parts / f"{RANK_DONE}{rank}-of-{ranks}", b"", shared=True)
        except FileNotFoundError:
            return None  # another start of the same screen has merged the parts
        if len(list(self.parts.glob(f"{RANK_DONE}*-of-{ranks}"))) < ranks:
            return None
        with self._exclusive():
            if not self.parts.is_dir():
                return None
            if self._complete_screen() is not None:
                self._remove_leftovers()
                if settings.top is None:
                    self._drop_repeats(self.part_records())
                return None
            records = self.part_records()
            chunks = {chunk: record for part in records.values() for chunk, record in part.items()}
            if total == 0:
                shutil.rmtree(self.parts)
                raise SourceError("the sources hold no structure; there is nothing to screen.")
            self._check_complete(chunks, total)
            rejected: Counter[str] = sum((record.rejected for record in chunks.values()), Counter())
            too_close: Counter[str] = sum((record.too_close for record in chunks.values()), Counter())
            written = self._merge(records, settings, schema, total)
            counts = {"refused": dict(rejected), "too_close": dict(too_close)}
            summary = {"structures": total, "written": written, **counts}
            if self.one_file:
                shutil.rmtree(self.parts)
            else:
                write_json(self.parts / SUMMARY_NAME, {**summary, "screen": self._screen}, shared=True)
                self._remove_leftovers()
            return summary

    def _remove_leftovers(self) -> None:
        """Remove everything but the result from the folder of a complete screen."""
        leftovers = [f"{RANK_DONE}*", ".part-*"]  # the second are temporary files of ranks that were killed
        if (self.parts / TOP_NAME).exists():
            leftovers.append(PARTS)
        for pattern in leftovers:
            for file in self.parts.glob(pattern):
                file.unlink()

    def _drop_repeats(self, records: PartRecords) -> None:
        """Keep each chunk in one part only: starts with different numbers of ranks may have screened it twice."""
        seen: set[int] = set()
        for path, part in records.items():
            kept = {chunk: record for chunk, record in part.items() if chunk not in seen}
            seen |= kept.keys()
            if not kept:
                path.unlink()
            elif len(kept) < len(part):
                table = read_part(path)
                selected = np.isin(table["index"].to_numpy() // CHUNK, list(kept))
                write_part(path.parent, [table.filter(pa.array(selected))], kept)
                path.unlink()

    def _check_complete(self, chunks: dict[int, ChunkRecord], total: int) -> None:
        """Raise SourceError unless the chunks hold exactly the `total` structures of the sources."""
        for chunk in range(-(-total // CHUNK)):
            expected = min(CHUNK, total - chunk * CHUNK)
            if chunk not in chunks or chunks[chunk].structures != expected:
                where = f"{chunk * CHUNK:,} to {chunk * CHUNK + expected - 1:,}"
                raise SourceError(
                    f"{self.parts} lacks some of the structures {where}: the sources have changed, or a rank could not "
                    "read them completely; remove it, and start again."
                )

    def _exclusive(self) -> AbstractContextManager[None]:
        """Wait until no other rank changes the output; the lock is released when its process ends."""
        return locked(self.out.with_name(f".{self.out.name}.lock"), remove=True)

    def _merge(self, records: PartRecords, settings: ScreenSettings, schema: pa.Schema, total: int) -> int:
        """Write the rows to keep of all `total` structures; return their number."""
        if settings.top is not None:
            top = TopRows(settings, schema)
            for path in records:
                top.add(with_columns(read_part(path), schema))
            return self._write_tables(self.out if self.one_file else self.out / TOP_NAME, iter([top.table()]))
        if self.one_file:
            return self._write_tables(self.out, _in_source_order(records, schema))
        self.check_parts(0, 1)
        self._drop_repeats(records)
        self._add_columns(schema)
        return total

    def _add_columns(self, schema: pa.Schema) -> None:
        """Write parts of earlier versions again with all columns, so that the folder can be read as one table."""
        for path, part in self.part_records().items():
            if pq.read_schema(path).names != schema.names:
                write_part(path.parent, [with_columns(read_part(path), schema)], part)
                path.unlink()

    def _write_tables(self, path: Path, tables: Iterator[pa.Table]) -> int:
        """Write tables of one schema to a temporary file and rename it to `path`; return the number of rows."""
        rows, writer = 0, None
        with replacing(path, shared=True) as temporary:
            for table in tables:
                table = table.replace_schema_metadata({SCREEN_KEY: self._screen.encode()})
                writer = writer or pq.ParquetWriter(temporary, table.schema, write_page_checksum=True)
                writer.write_table(table)
                rows += table.num_rows
            if writer is not None:
                writer.close()
        return rows


def _in_source_order(records: PartRecords, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the rows of all chunks in the order of the sources; each chunk is a row group of its part."""
    owner = {chunk: (path, place) for path, part in records.items() for place, chunk in enumerate(part)}
    open_part = lru_cache(maxsize=MAX_OPEN_PARTS)(partial(pq.ParquetFile, page_checksum_verification=True))
    waiting: list[pa.Table] = []
    for _, (path, place) in sorted(owner.items()):
        try:
            waiting.append(with_columns(open_part(path).read_row_group(place), schema))
        except (OSError, pa.ArrowException) as error:
            raise damaged(path) from error
        if len(waiting) == ROW_GROUP_CHUNKS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
