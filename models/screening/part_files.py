"""Parts of a screen's result: Parquet files that list the chunks they hold, so that a screen can be resumed."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hydrazero.models.screening.ranking import TopRows
from hydrazero.models.screening.settings import CHUNK, ScreenSettings
from hydrazero.shards.errors import SourceError
from hydrazero.shards.files import parse_json, replacing

PART_ROWS = 262_144
"""Number of rows at which a part is written."""
PART_SECONDS = 60.0
"""Seconds after which a part is written even if it has fewer rows."""
CHUNKS_KEY = b"hydrazero.screen"
"""Key of the Parquet metadata under which a part lists its chunks."""


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """An entry for one chunk in the metadata of a part."""

    structures: int
    rejected: Counter[str]
    """Number of structures that were not computed, by kind."""


def read_chunk_records(path: Path) -> dict[int, ChunkRecord]:
    """Return the chunks of a part in the order of their rows; raise SourceError if it cannot be read."""
    try:
        text = (pq.read_schema(path).metadata or {})[CHUNKS_KEY]
        document = parse_json(text, str(path), shape=list[tuple[int, int, dict[str, int]]])
        return {
            int(chunk): ChunkRecord(structures=structures, rejected=Counter(rejected))
            for chunk, structures, rejected in document
        }
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be read as a part of a screen ({error}); remove it and start again."
        ) from error


def write_part(path: Path, tables: list[pa.Table], records: dict[int, ChunkRecord]) -> None:
    """Write tables as the row groups of a part that holds the chunks of `records`.

    The part is written to a temporary file that is then renamed.
    """
    document = json.dumps([[chunk, record.structures, record.rejected] for chunk, record in records.items()])
    schema = tables[0].schema.with_metadata({CHUNKS_KEY: document.encode()})
    with replacing(path, shared=True) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


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
        self._name = f"part-{uuid.uuid4().hex}.parquet"

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
            chunk: ChunkRecord(structures=rows.num_rows, rejected=self._rejected.pop(chunk, Counter()))
            for chunk, rows in sorted(self._complete.items())
        }
        tables = [self._complete[chunk] for chunk in records]
        self._complete.clear()
        if self._top is None:
            # Every part has a unique name, so that two processes on the same chunks cannot overwrite each other's.
            name = f"part-{min(records):09d}-{uuid.uuid4().hex[:8]}.parquet"
            write_part(self.folder / name, tables if self._by_chunk else [pa.concat_tables(tables)], records)
            return
        self._top.add(pa.concat_tables(tables))
        self._top_records |= records
        write_part(self.folder / self._name, [self._top.table()], self._top_records)  # replaces the previous part
