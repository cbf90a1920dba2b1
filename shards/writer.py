"""Writing of a split's shards: blocks of structures in WebDataset tars, the same bytes for the same structures."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from webdataset import TarWriter

from hydrazero.shards.block import BLOCK_STRUCTURES, block_from_structures, encode_block
from hydrazero.shards.manifest import Shard, file_sha256
from hydrazero.shards.structure import Structure

BLOCKS_PER_SHARD = 64
MEMBER = "block.safetensors"


def write_split(folder: Path, split: str, structures: Sequence[Structure], float_dtype: str) -> list[Shard]:
    """Write structures, in the given order, as `SPLIT-NNNNNN.tar`; returns what the manifest says of them."""
    per_shard = BLOCKS_PER_SHARD * BLOCK_STRUCTURES
    return [
        _write_shard(folder / f"{split}-{number:06d}.tar", structures[first : first + per_shard], float_dtype)
        for number, first in enumerate(range(0, len(structures), per_shard))
    ]


def _write_shard(path: Path, structures: Sequence[Structure], float_dtype: str) -> Shard:
    sizes, checksums = [], []
    with open(path, "wb") as stream:
        # Fixed time and owner: equal content gives equal bytes.
        with TarWriter(stream, user="hydrazero", group="hydrazero", mtime=0.0, encoder=False) as tar:
            for number, first in enumerate(range(0, len(structures), BLOCK_STRUCTURES)):
                part = structures[first : first + BLOCK_STRUCTURES]
                data = encode_block(block_from_structures(part, float_dtype=float_dtype))
                tar.write({"__key__": f"{path.stem}-{number:06d}", MEMBER: data})
                sizes.append(len(part))
                checksums.append(zlib.crc32(data))
        stream.flush()
        os.fsync(stream.fileno())
    with tarfile.open(path) as tar_file:
        offsets = [member.offset for member in tar_file.getmembers()]
    return Shard(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        structures=len(structures),
        atoms=sum(len(s) for s in structures),
        block_offsets=offsets,
        block_structures=sizes,
        block_crc32=checksums,
    )
