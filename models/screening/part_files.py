"""Parts of a screen's result: Parquet files that list the chunks they hold, so that a screen can be resumed."""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hydrazero.models.screening.ranking import TopRows
from hydrazero.models.screening.settings import CHUNK, TOO_CLOSE, ScreenSettings
from hydrazero.shards.errors import SourceError
from hydrazero.shards.files import parse_json, write_bytes

PART_ROWS = 262_144
"""Number of rows at which a part is written."""
PART_SECONDS = 60.0
"""Seconds after which a part is written even if it has fewer rows."""
CHUNKS_KEY = b"hydrazero.screen"
"""Key of the Parquet metadata under which a part lists its chunks."""
ChunkEntry = tuple[int, int, dict[str, int]] | tuple[int, int, dict[str, int], dict[str, int]]
"""Number of a chunk, its structures, and what a ChunkRecord counts; without the last where it counts nothing."""


DIGITS = 32
"""Number of hexadecimal digits of the SHA-256 of a part in its name."""
NAME = re.compile(rf"part-\d{{9,}}-([0-9a-f]{{{DIGITS}}})\.parquet")
"""Name of a part: its first chunk, and the digest of its content."""


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """An entry for one chunk in the metadata of a part."""

    structures: int
    rejected: Counter[str]
    """Number of structures that were not computed, by kind."""
    too_close: Counter[str]
    """Number of structures with atoms closer than in the training data, by task; empty in parts of earlier versions."""

    def listed(self, chunk: int) -> list[Any]:
        """Return the entry of a chunk in the metadata of a part."""
        return [chunk, self.structures, self.rejected, *[self.too_close] * bool(self.too_close)]


def read_chunk_records(path: Path) -> dict[int, ChunkRecord]:
    """Return the chunks of a part in the order of their rows; raise SourceError if it cannot be read.

    Raises FileNotFoundError if another rank has replaced it meanwhile.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        text = (pq.read_schema(path).metadata or {})[CHUNKS_KEY]
        document = parse_json(text, str(path), shape=list[ChunkEntry])
        return {
            chunk: ChunkRecord(structures=structures, rejected=Counter(rejected), too_close=Counter(*too_close))
            for chunk, structures, rejected, *too_close in document
        }
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be read as a part of a screen ({error}); remove it and start again."
        ) from error


def write_part(folder: Path, tables: list[pa.Table], records: dict[int, ChunkRecord]) -> Path:
    """Write tables as the row groups of a part that holds the chunks of `records`; return its path.

    The digest of its content is a part of its name, which therefore no other part has. The part is written to a
    temporary file that is then renamed.
    """
    document = json.dumps([record.listed(chunk) for chunk, record in records.items()])
    schema = tables[0].schema.with_metadata({CHUNKS_KEY: document.encode()})
    content = io.BytesIO()
    with pq.ParquetWriter(content, schema, write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    data = content.getvalue()
    path = folder / f"part-{min(records):09d}-{sha256(data).hexdigest()[:DIGITS]}.parquet"
    write_bytes(path, data, shared=True)
    return path


def check_part(path: Path) -> None:
    """Raise SourceError unless the content of a part is what was written; parts of earlier versions are not checked."""
    named = NAME.fullmatch(path.name)
    if named is None:
        return
    with open(path, "rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if digest[:DIGITS] != named[1]:
        raise damaged(path)


def damaged(path: Path) -> SourceError:
    """Return the error for a part whose content has changed."""
    return SourceError(
        f"{path} is damaged: its content is not what was written; remove this file, and the same command computes its "
        "structures again."
    )


def read_part(path: Path) -> pa.Table:
    """Return the rows of a part; raise SourceError if the checksum of a page is wrong."""
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path) from error


class PartWriter:
    """Collect the rows of a rank, and write those of complete chunks."""

    def __init__(self, folder: Path, settings: ScreenSettings, schema: pa.Schema, *, by_chunk: bool) -> None:
        """Write parts into a folder; with `by_chunk`, each chunk is a row group, so that it can be read alone."""
        self.folder, self._by_chunk = folder, by_chunk
        self._rows: dict[int, list[pa.Table]] = {}
        self._counts: Counter[int] = Counter()
        self._expected: dict[int, int] = {}
        self._rejected: dict[int, Counter[str]] = {}
        self._complete: dict[int, pa.Table] = {}
        self._since = time.monotonic()
        self._top = None if settings.top is None else TopRows(settings, schema)
        self._top_records: dict[int, ChunkRecord] = {}
        self._part: Path | None = None
        """The part that holds the rows of this start that rank lowest."""

    def add(self, table: pa.Table, kinds: list[str] | None = None) -> None:
        """Add rows of any chunks; `kinds` gives the kind of each rejection if the rows are rejected structures."""
        chunks = table["index"].to_numpy() // CHUNK
        for chunk in np.unique(chunks).tolist():
            selected = chunks == chunk
            self._rows.setdefault(chunk, []).append(table if selected.all() else table.filter(pa.array(selected)))
            self._counts[chunk] += int(selected.sum())
            if kinds is not None:
                chunk_kinds = [kind for kind, chosen in zip(kinds, selected, strict=True) if chosen]
                self._rejected.setdefault(chunk, Counter()).update(chunk_kinds)
            self._take_if_complete(chunk)

    def expect(self, chunks: dict[int, int]) -> None:
        """Set the number of structures of chunks that have been read to their end."""
        self._expected.update(chunks)
        for chunk in chunks:
            self._take_if_complete(chunk)

    def _take_if_complete(self, chunk: int) -> None:
        if self._counts[chunk] != self._expected.get(chunk):
            return
        del self._counts[chunk]
        rows = pa.concat_tables(self._rows.pop(chunk))
        self._complete[chunk] = rows.sort_by("index")
        late = time.monotonic() - self._since > PART_SECONDS
        if late or sum(table.num_rows for table in self._complete.values()) >= PART_ROWS:
            self.write()

    def write(self) -> None:
        """Write the chunks that are complete."""
        self._since = time.monotonic()
        if not self._complete:
            return
        records = {
            chunk: ChunkRecord(
                structures=rows.num_rows,
                rejected=self._rejected.pop(chunk, Counter()),
                too_close=_too_close(rows),
            )
            for chunk, rows in sorted(self._complete.items())
        }
        tables = [self._complete[chunk] for chunk in records]
        self._complete.clear()
        if self._top is None:
            write_part(self.folder, tables if self._by_chunk else [pa.concat_tables(tables)], records)
            return
        self._top.add(pa.concat_tables(tables))
        self._top_records |= records
        previous, self._part = self._part, write_part(self.folder, [self._top.table()], self._top_records)
        if previous not in (None, self._part):
            previous.unlink()  # what it holds is in the new part


def _too_close(rows: pa.Table) -> Counter[str]:
    """Return the number of rows with atoms closer than in the training data, for each task that has such rows."""
    columns = [name for name in rows.column_names if name.startswith(TOO_CLOSE)]
    counts = {name.removeprefix(TOO_CLOSE): pc.sum(rows[name]).as_py() for name in columns}
    return Counter({task: count for task, count in counts.items() if count})
