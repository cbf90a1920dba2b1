"""Reading of single blocks out of WebDataset tars, with checksums and a small cache."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.gopen import gopen
from webdataset.tariterators import tar_file_iterator

from hydrazero.shards.block import StructureBlock, decode_block
from hydrazero.shards.errors import ShardError
from hydrazero.shards.manifest import Manifest, Shard, read_manifest

CACHED_BLOCKS = 128
"""Decoded blocks kept per reader: about 40 MB for molecules."""


class BlockReader:
    """Blocks of one split of one task, by number."""

    def __init__(self, folder: Path | str, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest: Manifest = read_manifest(self.folder)
        self._blocks: list[tuple[Shard, int]] = [
            (shard, index)
            for shard in self.manifest.splits.get(split, [])
            for index in range(len(shard.block_structures))
        ]
        self._cache: OrderedDict[int, StructureBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def block_sizes(self) -> NDArray[np.int64]:
        """Structures in each block, [blocks]."""
        return np.array([shard.block_structures[index] for shard, index in self._blocks], dtype=np.int64)

    def read(self, number: int) -> StructureBlock:
        """Read one block; raises ShardError, naming the shard and block, if it is missing or damaged."""
        shard, index = self._blocks[number]
        where = f"shard {self.folder / shard.file}, block {index}"
        data = self._read_bytes(shard, index, where)
        if zlib.crc32(data) != shard.block_crc32[index]:
            raise ShardError(f"{where} has another checksum than the manifest says: copy or convert the task again.")
        return decode_block(data, where)

    def cached(self, number: int) -> StructureBlock:
        """Read one block, or return it from the cache where it is there."""
        if number not in self._cache:
            self._cache[number] = self.read(number)
            if len(self._cache) > CACHED_BLOCKS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return self._cache[number]

    def _read_bytes(self, shard: Shard, index: int, where: str) -> bytes:
        try:
            with gopen(str(self.folder / shard.file)) as stream:
                stream.seek(shard.block_offsets[index])
                for member in tar_file_iterator(stream):
                    return member["data"]
        except Exception as error:  # OSError, tarfile.ReadError and EOFError, by where the damage is
            raise ShardError(f"{where} cannot be read ({error}); copy or convert the task again.") from error
        raise ShardError(f"{where} is not where the manifest says; copy or convert the task again.")
