"""Parts of a screen's result: files that appear whole, and say which chunks they hold, so that a screen can go on."""

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

from hydrazero.models.screening.settings import CHUNK, Ranking, ScreenSettings, rankable
from hydrazero.shards.errors import SourceError
from hydrazero.shards.files import replacing

PART_ROWS = 262_144
PART_SECONDS = 60.0
"""A part is written when it has so many rows, or when its first is so old."""
KEY = b"hydrazero.screen"


@dataclass(frozen=True, kw_only=True)
class ChunkNote:
    """What a part says of one of its chunks."""

    structures: int
    refused: Counter[str]
    """Structures not computed, by kind."""


def note_of(path: Path) -> dict[int, ChunkNote]:
    """Return the chunks of a part, in the order of their rows; raises SourceError if it cannot be read."""
    try:
        document = json.loads((pq.read_schema(path).metadata or {})[KEY])
        return {
            int(chunk): ChunkNote(structures=structures, refused=Counter(refused))
            for chunk, structures, refused in document
        }
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise SourceError(f"{path} is no readable part of a screen ({error}); remove it, and start again.") from error


def write_part(path: Path, tables: list[pa.Table], notes: dict[int, ChunkNote]) -> None:
    """Write tables of the chunks that the notes are of, each as a row group; the file appears when it is whole."""
    said = json.dumps([[chunk, note.structures, note.refused] for chunk, note in notes.items()])
    schema = tables[0].schema.with_metadata({KEY: said.encode()})
    with replacing(path, shared=True) as part, pq.ParquetWriter(part, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


class Best:
    """The rows of lowest rank among all that were added."""

    def __init__(self, settings: ScreenSettings, schema: pa.Schema) -> None:
        self.top = settings.top or 0
        self._ranking = Ranking(settings.ranking, rankable(schema))
        self._held: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Take a table's rows into account."""
        self._held.append(table)
        self._rows += table.num_rows
        if self._rows > 2 * self.top + CHUNK:
            self._thin()

    def _thin(self) -> None:
        table = pa.concat_tables(self._held)
        first = np.unique(table["index"].to_numpy(), return_index=True)[1]
        table = table.take(pa.array(first))  # should a chunk be in two parts
        given = {name: table[name].to_numpy().astype(np.float64) for name in self._ranking.columns.values()}
        known = table["reason"].is_null().to_numpy()  # whatever the expression makes of a structure without numbers
        for values in given.values():
            known &= np.isfinite(values)
        rank = self._ranking(given) if table.num_rows else np.zeros(0)
        known &= np.isfinite(rank)
        # Equal ones in the order of the sources, so that the result is one and the same however it was shared out.
        order = np.lexsort((table["index"].to_numpy(), rank))
        order = order[known[order]][: self.top]
        self._held, self._rows = [table.take(pa.array(order))], len(order)

    def table(self) -> pa.Table:
        """The best rows, the lowest first."""
        self._thin()
        return self._held[0]


class PartWriter:
    """Collects a rank's rows, and writes those of chunks that are whole."""

    def __init__(self, folder: Path, settings: ScreenSettings, schema: pa.Schema, *, by_chunk: bool) -> None:
        """With `by_chunk` each chunk is a row group of its part, so that it can be read alone."""
        self.folder, self._by_chunk = folder, by_chunk
        self._rows: dict[int, list[pa.Table]] = {}
        self._counts: Counter[int] = Counter()
        self._expected: dict[int, int] = {}
        self._refused: dict[int, Counter[str]] = {}
        self._whole: dict[int, pa.Table] = {}
        self._since = time.monotonic()
        self._best = None if settings.top is None else Best(settings, schema)
        self._best_notes: dict[int, ChunkNote] = {}
        self._name = f"part-{uuid.uuid4().hex}.parquet"

    def add(self, table: pa.Table, kinds: list[str] | None = None) -> None:
        """Take rows, of any chunks; `kinds` says of each why it was refused."""
        chunks = table["index"].to_numpy() // CHUNK
        for chunk in np.unique(chunks).tolist():
            mine = chunks == chunk
            self._rows.setdefault(chunk, []).append(table if mine.all() else table.filter(pa.array(mine)))
            self._counts[chunk] += int(mine.sum())
            if kinds is not None:
                there = [kind for kind, is_mine in zip(kinds, mine, strict=True) if is_mine]
                self._refused.setdefault(chunk, Counter()).update(there)
            self._look_at(chunk)

    def finished(self, chunks: dict[int, int]) -> None:
        """Learn that chunks have been read to their end, and how many structures they hold."""
        self._expected.update(chunks)
        for chunk in chunks:
            self._look_at(chunk)

    def _look_at(self, chunk: int) -> None:
        if self._counts[chunk] != self._expected.get(chunk):
            return
        del self._counts[chunk]
        rows = pa.concat_tables(self._rows.pop(chunk))
        self._whole[chunk] = rows.sort_by("index")
        late = time.monotonic() - self._since > PART_SECONDS
        if late or sum(table.num_rows for table in self._whole.values()) >= PART_ROWS:
            self.write()

    def write(self) -> None:
        """Write the chunks that are whole."""
        self._since = time.monotonic()
        if not self._whole:
            return
        notes = {
            chunk: ChunkNote(structures=rows.num_rows, refused=self._refused.pop(chunk, Counter()))
            for chunk, rows in sorted(self._whole.items())
        }
        tables = [self._whole[chunk] for chunk in notes]
        self._whole.clear()
        if self._best is None:
            # A name of its own: should two processes ever work on the same chunks, neither loses what the other has.
            name = f"part-{min(notes):09d}-{uuid.uuid4().hex[:8]}.parquet"
            write_part(self.folder / name, tables if self._by_chunk else [pa.concat_tables(tables)], notes)
            return
        self._best.add(pa.concat_tables(tables))
        self._best_notes |= notes
        write_part(self.folder / self._name, [self._best.table()], self._best_notes)  # instead of the one before
