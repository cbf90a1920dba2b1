"""Second part of a conversion: which structures repeat earlier ones, and which shard each goes to, on the disk.

The index is an SQLite database, which sorts what does not fit into memory.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.convert.checks.equal_geometries import equal_geometry_warning, frame_name
from hydrazero.shards.convert.checks.evidence import Evidence
from hydrazero.shards.convert.checks.left_out_atoms import LeftOutAtoms
from hydrazero.shards.convert.folder import Conversion
from hydrazero.shards.convert.frames import CHUNK_FRAMES, ChunkFile, chunk_path, frames_path
from hydrazero.shards.files import read_json, without_links, write_bytes
from hydrazero.shards.manifest import SPLITS

SET_ASIDE_NAME = "set_aside.jsonl"
NAMED_DUPLICATES = 1000

TABLE = """
CREATE TABLE frames (number INTEGER PRIMARY KEY, hash BLOB, split INTEGER, key INTEGER, source INTEGER, chunk INTEGER,
row INTEGER, energy REAL, atoms INTEGER)
"""

REPEATS = """
SELECT later.number, first.number, first.split FROM frames AS later JOIN
(SELECT hash, MIN(number) AS number, split FROM frames GROUP BY hash HAVING COUNT(*) > 1) AS first
ON later.hash = first.hash WHERE later.number > first.number ORDER BY later.number
"""


@dataclass(kw_only=True)
class Index:
    """Order of the structures in each split, duplicates, and numbers of frames that are left out."""

    orders: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Split -> array [structures, 3] of source, chunk and row, in the order of the shards; mapped from the disk."""
    duplicates: list[str] = field(default_factory=list)
    duplicate_count: int = 0
    equal_geometries: str | None = None
    """Sentence about equal geometries with different energies."""
    evidence: Evidence
    """What the checks of labels need."""
    set_aside: Counter[str] = field(default_factory=Counter)
    left_out_atoms: LeftOutAtoms = field(default_factory=LeftOutAtoms)
    """Isolated atoms among these frames."""
    lacking: Counter[str] = field(default_factory=Counter)
    """Key of [select] -> number of frames without such a field."""
    fields: list[str] = field(default_factory=list)
    """Fields of one of these frames."""


def build_index(job: Conversion) -> Index:
    """Read all chunks, find duplicate geometries, and put the structures of each split into a random order."""
    path = job.folder / "index.sqlite"
    path.unlink(missing_ok=True)
    index = Index(evidence=Evidence(sum(_frames_of(job, source) for source in range(len(job.sources)))))
    database = sqlite3.connect(path)
    try:
        # The index is built again if the machine fails; an fsync after every page would cost more.
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute(TABLE)
        database.executemany("INSERT INTO frames VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", _rows(job, index))
        database.execute("CREATE INDEX by_hash ON frames (hash, number)")
        _mark_duplicates(database, job, index)
        database.execute("CREATE INDEX by_key ON frames (split, key, number)")
        for number, split in enumerate(SPLITS):
            index.orders[split] = _order(database, job, number, split)
    except sqlite3.OperationalError as error:  # raised when the disk is full or fails
        raise OSError(str(error)) from error
    finally:
        database.close()
    return index


def chunks_of(job: Conversion) -> Iterator[tuple[int, int]]:
    """Yield (source, chunk) of all chunks, in order."""
    for source in range(len(job.sources)):
        for chunk in range(-(-_frames_of(job, source) // CHUNK_FRAMES)):
            yield source, chunk


def _frames_of(job: Conversion, source: int) -> int:
    frames: int = read_json(frames_path(job, source), shape=int)
    return frames


Row = tuple[int, bytes, int, int, int, int, int, float | None, int]
"""A row of the table."""


def _rows(job: Conversion, index: Index) -> Iterator[Row]:
    """Yield the rows of the table; count and list the frames that are left out."""
    number = 0
    lines = bytearray()
    for source, chunk in chunks_of(job):
        file = ChunkFile(chunk_path(job, source, chunk))
        index.left_out_atoms.merge(file.left_out_atoms)
        if file.not_selected:
            index.set_aside["not_selected"] += file.not_selected
            index.lacking.update(file.lacking)
            index.fields = index.fields or file.fields
        for entry in file.bad:
            index.set_aside[entry["reason"]] += 1
            lines += json.dumps(entry).encode() + b"\n"
        splits = file.column("splits")
        if not len(splits):
            continue
        hashes = file.column("hashes")
        energies, atoms = file.column("energy").tolist(), file.column("n_atoms").tolist()
        index.evidence.add(source, number, file)
        keys = shuffling_keys(np.arange(number, number + len(splits)), job.settings.split.seed)
        for row, (split, key) in enumerate(zip(splits.tolist(), keys.tolist(), strict=True)):
            energy = None if np.isnan(energies[row]) else energies[row]
            yield number, hashes[row].tobytes(), split, key, source, chunk, row, energy, atoms[row]
            number += 1
    if lines:
        write_bytes(job.shards / SET_ASIDE_NAME, bytes(lines), durable=True)


def shuffling_keys(numbers: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return a random 63-bit key for each number of a frame: splitmix64 (Steele, Lea, Flood 2014) with a seed."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        x = (numbers.astype(np.uint64) + np.uint64(seed % 2**32) * np.uint64(2**32) + np.uint64(1)) * golden
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(1)).astype(np.int64)


def _mark_duplicates(database: sqlite3.Connection, job: Conversion, index: Index) -> None:
    """Count duplicates of earlier geometries; those that are kept go into the split of the first one."""
    drop = job.settings.duplicates == "drop"
    database.execute("CREATE TABLE repeats (number INTEGER PRIMARY KEY, first INTEGER, split INTEGER)")
    database.execute(f"INSERT INTO repeats {REPEATS}")
    (index.duplicate_count,) = database.execute("SELECT COUNT(*) FROM repeats").fetchone()
    index.equal_geometries = equal_geometry_warning(database, job) if index.duplicate_count else None
    named = database.execute("SELECT number, first FROM repeats ORDER BY number LIMIT ?", (NAMED_DUPLICATES,))
    index.duplicates = [f"{_name(database, job, n)} = {_name(database, job, first)}" for n, first in named.fetchall()]
    if drop:
        database.execute("DELETE FROM frames WHERE number IN (SELECT number FROM repeats)")
    else:
        database.execute(
            "UPDATE frames SET split = (SELECT split FROM repeats WHERE repeats.number = frames.number) "
            "WHERE number IN (SELECT number FROM repeats)"
        )


def _name(database: sqlite3.Connection, job: Conversion, number: int) -> str:
    query = "SELECT source, chunk, row FROM frames WHERE number = ?"
    source, chunk, row = database.execute(query, (number,)).fetchone()
    return frame_name(job, source, chunk, row)


def _order(database: sqlite3.Connection, job: Conversion, number: int, split: str) -> NDArray[np.int64]:
    """Sort a split by its random keys into an array [structures, 3] on the disk."""
    (count,) = database.execute("SELECT COUNT(*) FROM frames WHERE split = ?", (number,)).fetchone()
    if count == 0:
        return np.zeros((0, 3), dtype=np.int64)
    path = job.folder / f"order-{split}.rows"
    query = "SELECT source, chunk, row FROM frames WHERE split = ? ORDER BY key, number"
    cursor = database.execute(query, (number,))
    # Written as a file and mapped only for reading: writing to a map on a full disk would end the process.
    with open(path, "wb", opener=without_links) as file:
        while rows := cursor.fetchmany(100_000):
            file.write(np.array(rows, dtype=np.int64).tobytes())
    return np.memmap(path, mode="r", dtype=np.int64, shape=(count, 3))
