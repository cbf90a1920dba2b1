"""Structures to screen, out of shard folders and source files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hydrazero.shards.block_reader import BlockReader
from hydrazero.shards.errors import SourceError
from hydrazero.shards.manifest import SPLITS
from hydrazero.shards.readers import read_frames
from hydrazero.shards.readers.frames import FieldNames, ReadSettings
from hydrazero.shards.structure import Structure

GEOMETRY_ALONE = ReadSettings(fields=FieldNames(energy="", forces="", stress=""))
"""A label that is missing or faulty does not matter to a screen."""


def structures_of(sources: Sequence[Path]) -> Iterator[Structure]:
    """Yield every structure of shard folders (all splits) and of files that `convert` reads; labels are not needed.

    Raises SourceError, naming file and frame, for a structure that cannot be used, ShardError for damaged shards.
    """
    for source in sources:
        if source.is_dir():
            yield from _structures_of_shards(source)
            continue
        for frame in read_frames(source, GEOMETRY_ALONE):
            if frame.structure is None:
                number = frame.source_id.rpartition("#")[2]
                raise SourceError(f"{source}, frame {number}: {frame.error}; leave it out of the screen.")
            yield frame.structure


def _structures_of_shards(folder: Path) -> Iterator[Structure]:
    for split in SPLITS:
        reader = BlockReader(folder, split)
        for number in range(len(reader)):
            block = reader.read(number)
            yield from (block.structure(row) for row in range(len(block)))
