"""Reading of single blocks of local and remote shards, with retries, checksums and a bounded cache."""

from __future__ import annotations

import io
import tarfile
import time
import zlib
from collections import OrderedDict
from typing import BinaryIO, cast

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from hydrazero.shards.block import StructureBlock
from hydrazero.shards.block_checks import decode_block
from hydrazero.shards.errors import ShardError
from hydrazero.shards.location import Location, open_at
from hydrazero.shards.manifest import STATISTICS, Manifest, read_manifest
from hydrazero.shards.manifest_parts import Shard

CACHE_BYTES = 96_000_000
"""Maximum size of the cache of decoded blocks in bytes, about 300 blocks of molecules."""

PIECE = 16 << 20
"""Number of bytes that are read at once."""

RETRY_AFTER = (0.2, 2.0)
"""Seconds to wait before each further attempt at a failed read; after the last one, the block counts as damaged."""


class BlockReader:
    """Reads the blocks of one split of one task by their numbers."""

    def __init__(self, folder: Location, split: str, manifest: Manifest | None = None) -> None:
        """Read the manifest unless it is given; raise ShardError if it cannot be read."""
        self.location, self.folder, self.split = folder, str(folder), split
        self.manifest = read_manifest(folder) if manifest is None else manifest
        self._blocks: list[tuple[Shard, int]] = [
            (shard, index)
            for shard in self.manifest.splits.get(split, [])
            for index in range(len(shard.block_structures))
        ]
        self._damaged: dict[int, str] = {}
        self._known = np.zeros(256, dtype=bool)
        # Where energies may be absent, elements without any are not among those that are trained.
        trained = split == "train" and "energy" in self.manifest.required_labels
        elements = self.manifest.trained_elements if trained else self.manifest.elements
        self._known[[atomic_numbers[symbol] for symbol in elements]] = True

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def block_sizes(self) -> NDArray[np.int64]:
        """Number of structures in each block, [blocks]."""
        return np.array([shard.block_structures[index] for shard, index in self._blocks], dtype=np.int64)

    def read(self, number: int) -> StructureBlock:
        """Return one block; a failed read is repeated.

        Raises ShardError with the shard and the block if the block is still missing or damaged after the last attempt,
        or if it is not one that the manifest describes.
        """
        if number in self._damaged:
            raise ShardError(self._damaged[number])
        shard, index = self._blocks[number]
        for wait in (*RETRY_AFTER, None):
            try:
                return self._read(shard, index)
            except ShardError as error:
                if wait is None:
                    self._damaged[number] = str(error)
                    raise
                time.sleep(wait)
        raise RuntimeError("unreachable")

    def _read(self, shard: Shard, index: int) -> StructureBlock:
        where = f"shard {self.folder}/{shard.file}, block {index}"
        data = self._read_bytes(shard, index, where)
        if zlib.crc32(data) != shard.block_crc32[index]:
            raise ShardError(
                f"{where} does not have the checksum of the manifest; copy it again or convert the task again."
            )
        block = decode_block(data, where)
        if len(block) != shard.block_structures[index]:
            raise ShardError(
                f"{where} holds {len(block)} structures, but {shard.block_structures[index]} according to the "
                "manifest: they come from different conversions; convert the task again."
            )
        if fault := self._contradiction(block):
            raise ShardError(f"{where} {fault}: manifest and block contradict each other; convert the task again.")
        return block

    def _contradiction(self, block: StructureBlock) -> str:
        """Return what in a block the manifest excludes, "" if there is nothing."""
        manifest = self.manifest
        if block.positions.dtype != manifest.float_dtype:
            return f"holds positions of type {block.positions.dtype}, not {manifest.float_dtype}"
        if not self._known[block.numbers].all():
            return "holds an element that the manifest does not list"
        if block.n_atoms.max() > manifest.max_atoms:
            return f"holds a structure of {block.n_atoms.max():,} atoms, the largest has {manifest.max_atoms:,}"
        for label, statistics in STATISTICS.items():
            column = getattr(block, label)
            if label in manifest.required_labels and (column is None or np.isnan(column).any()):
                return f"lacks {label}, which every structure has"
            if statistics not in manifest.labels and self.split == "train" and not (column is None or _absent(column)):
                return f"holds {label}, which no structure of the training split has"
        if not manifest.charged_structures and (block.charge.any() or block.multiplicity.max() > 1):
            return "holds charges or multiplicities, which no structure has"
        if not manifest.multiplicity_known and block.multiplicity.any():
            return "holds multiplicities, which no structure has"
        return ""

    def _read_bytes(self, shard: Shard, index: int, where: str) -> bytes:
        begin = shard.block_offsets[index]
        end = shard.block_offsets[index + 1] if index + 1 < len(shard.block_offsets) else shard.bytes
        try:
            with open_at(self.location, shard.file, begin, end) as stream:
                found = io.BytesIO(read_up_to(stream, end - begin))
            with tarfile.open(fileobj=found, mode="r:") as tar:
                member = tar.next()
                # A member may claim any size: it is only read if it ends where the next one begins.
                if member is not None and member.isreg() and member.offset_data + member.size <= end - begin:
                    return cast(BinaryIO, tar.extractfile(member)).read()
        except Exception as error:  # OSError, tarfile.ReadError or EOFError, depending on the damage
            raise ShardError(f"{where} cannot be read ({error}); copy it again or convert the task again.") from error
        raise ShardError(
            f"{where} is not at the place that the manifest gives; copy it again or convert the task again."
        )


def _absent(column: NDArray[np.floating]) -> bool:
    return bool(np.isnan(column).all())


def read_up_to(stream: BinaryIO, most: int) -> bytes:
    """Return the next bytes of a file, at most `most`, without taking memory for more than there are."""
    parts = []
    while most > 0 and (part := stream.read(min(most, PIECE))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


class BlockCache:
    """Cache of decoded blocks of several readers, which drops the longest unused ones if it becomes too large."""

    def __init__(self, readers: list[BlockReader], most_bytes: int = CACHE_BYTES) -> None:
        self.readers, self.most_bytes = readers, most_bytes
        self._blocks: OrderedDict[tuple[int, int], StructureBlock] = OrderedDict()
        self._bytes = 0

    def block(self, task: int, number: int) -> StructureBlock:
        """Return a block of a task, from the cache if possible; raise ShardError as `BlockReader.read` does."""
        key = (task, number)
        if key not in self._blocks:
            block = self.readers[task].read(number)
            self._blocks[key] = block
            self._bytes += block.nbytes
            while self._bytes > self.most_bytes and len(self._blocks) > 1:
                _, dropped = self._blocks.popitem(last=False)
                self._bytes -= dropped.nbytes
        self._blocks.move_to_end(key)
        return self._blocks[key]
