"""Third part of a conversion: one worker writes each shard from the structures in the chunks, and counts them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from hydrazero.shards.block import BLOCK_STRUCTURES, StructureBlock, block_from
from hydrazero.shards.convert.folder import Conversion
from hydrazero.shards.convert.frames import ChunkFile, chunk_path, length_of
from hydrazero.shards.convert.task_statistics import Statistics
from hydrazero.shards.convert.writer import BLOCKS_PER_SHARD, write_shard
from hydrazero.shards.files import write_bytes
from hydrazero.shards.manifest_parts import Shard

SHARD_STRUCTURES = BLOCKS_PER_SHARD * BLOCK_STRUCTURES

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ShardNote:
    """A finished shard, and the statistics of its structures."""

    shard: Shard
    statistics: Statistics


ShardCall = tuple[Conversion, str, int, NDArray[np.int64]]
"""Arguments of `make_shard`."""


def shard_calls(job: Conversion, orders: dict[str, NDArray[np.int64]]) -> list[ShardCall]:
    """Return the arguments of `make_shard` for each shard, given the order of the structures in each split."""
    return [
        (job, split, number, order[first : first + SHARD_STRUCTURES])
        for split, order in orders.items()
        for number, first in enumerate(range(0, len(order), SHARD_STRUCTURES))
    ]


def make_shard(job: Conversion, split: str, number: int, places: NDArray[np.int64]) -> ShardNote:
    """Write a shard of the structures at `places` ([structures, 3]: source, chunk, row), and a note of it.

    If the note exists already, the shard is complete, and only the note is read.
    """
    name = f"{split}-{number:06d}"
    note_path = job.notes / f"{name}.safetensors"
    if (noted := _read_note(note_path)) is not None:
        return noted
    structures = _gather(job, np.asarray(places))
    blocks = [
        block_from_columns(structures[first : first + BLOCK_STRUCTURES])
        for first in range(0, len(structures), BLOCK_STRUCTURES)
    ]
    shard = write_shard(job.shards / f"{name}.tar", blocks)
    statistics = Statistics()
    for block in blocks:
        extensive = [name for name, target in job.settings.targets.items() if target.extensive]
        statistics.add(block, split, job.settings.degree_cutoffs, extensive)
    note = ShardNote(shard=shard, statistics=statistics)
    write_bytes(note_path, _written_note(note), durable=True)
    return note


NOTE = "note"
"""Key of the metadata of a note's file under which everything but arrays is, as JSON."""


def _written_note(note: ShardNote) -> bytes:
    """Return a note as safetensors: the arrays of the statistics as tensors, everything else as JSON."""
    statistics = vars(note.statistics)
    arrays = {name: value for name, value in statistics.items() if isinstance(value, np.ndarray)}
    others = {name: value for name, value in statistics.items() if name not in arrays}
    document = json.dumps({"shard": note.shard, "statistics": others}, default=_plain)
    return safetensors.numpy.save(arrays, metadata={NOTE: document})


def _plain(value: Any) -> Any:
    """Return a dataclass or a set as a type that JSON has; raise TypeError for anything else."""
    return sorted(value) if isinstance(value, set) else {each.name: getattr(value, each.name) for each in fields(value)}


def _read_note(path: Path) -> ShardNote | None:
    """Return the note of a finished shard, or None if there is none.

    A note that does not fit the classes of this version is ignored: the same shard is then written again.
    """
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            document = json.loads(file.metadata()[NOTE])
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        hints = get_type_hints(Statistics)
        values |= {
            name: TypeAdapter(hints[name]).validate_json(json.dumps(value))
            for name, value in document["statistics"].items()
        }
        statistics = Statistics(**{each.name: values[each.name] for each in fields(Statistics)})
        return ShardNote(shard=TypeAdapter(Shard).validate_json(json.dumps(document["shard"])), statistics=statistics)
    except (safetensors.SafetensorError, ValidationError, KeyError, TypeError, ValueError):
        return None


def _gather(job: Conversion, places: NDArray[np.int64]) -> list[Columns]:
    """Read the structures at the given places, in their order, and open each chunk once."""
    found: list[Columns] = [{} for _ in places]
    by_chunk = np.lexsort((places[:, 2], places[:, 1], places[:, 0]))
    files = places[by_chunk][:, :2]
    starts = np.flatnonzero(np.concatenate([[True], (files[1:] != files[:-1]).any(axis=1)]))
    for first, last in zip(starts, [*starts[1:], len(places)], strict=True):
        members = by_chunk[first:last]
        source, chunk = places[members[0], :2].tolist()
        file = ChunkFile(chunk_path(job, source, chunk))
        for member, (_, columns) in zip(members, file.structures(places[members, 2]), strict=True):
            found[member] = columns
    return found


def block_from_columns(structures: Sequence[Columns]) -> StructureBlock:
    """Join the columns of single structures into one block; labels that some structures lack are NaN."""
    names = set().union(*(columns.keys() for columns in structures))
    joined: Columns = {}
    for name in names - {"source_ids"}:
        example = next(columns[name] for columns in structures if name in columns)
        parts = []
        for columns in structures:
            if name in columns:
                parts.append(columns[name])
            else:  # forces or stress of a chunk in which no structure has any
                rows = int(columns["n_atoms"][0]) if length_of(name) == "atoms" else 1
                parts.append(np.full((rows, *example.shape[1:]), np.nan, dtype=example.dtype))
        joined[name] = np.concatenate(parts)
    for name in [name for name in joined if name in ("forces", "stress") or "target." in name]:
        if np.isnan(joined[name]).all():
            del joined[name]
    joined["source_ids"] = np.frombuffer(b"\n".join(c["source_ids"].tobytes() for c in structures), dtype=np.uint8)
    return block_from(joined)
