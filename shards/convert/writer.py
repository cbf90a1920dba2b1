"""Writing of shards: WebDataset tars of blocks; equal structures give equal bytes."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from webdataset import TarWriter

from hydrazero.shards.block import StructureBlock, encode_block
from hydrazero.shards.block_checks import decode_block
from hydrazero.shards.files import replacing
from hydrazero.shards.manifest import file_sha256
from hydrazero.shards.manifest_parts import Shard

BLOCKS_PER_SHARD = 64
MEMBER = "block.safetensors"


def write_shard(path: Path, blocks: Sequence[StructureBlock]) -> Shard:
    """Write a tar of blocks through a temporary file, and return its entry for the manifest."""
    checksums = []
    with replacing(path, durable=True) as part:
        # Fixed time and owner: equal content gives equal bytes.
        with (
            open(part, "wb") as stream,
            TarWriter(stream, user="hydrazero", group="hydrazero", mtime=0.0, encoder=False) as tar,
        ):
            for number, block in enumerate(blocks):
                data = encode_block(block)
                tar.write({"__key__": f"{path.stem}-{number:06d}", MEMBER: data})
                checksums.append(zlib.crc32(data))
        with tarfile.open(part) as tar_file:
            offsets = [member.offset for member in tar_file.getmembers()]
        shard = Shard(
            file=path.name,
            bytes=part.stat().st_size,
            sha256=file_sha256(part),
            structures=sum(len(block) for block in blocks),
            atoms=sum(int(block.n_atoms.sum()) for block in blocks),
            block_offsets=offsets,
            block_structures=[len(block) for block in blocks],
            block_crc32=checksums,
        )
    return shard


def read_blocks(path: Path, shard: Shard) -> Iterator[StructureBlock]:
    """Yield the blocks of a local shard, in order."""
    with tarfile.open(path) as tar:
        for number, member in enumerate(tar):
            file = tar.extractfile(member)
            if file is not None:
                yield decode_block(file.read(), f"shard {shard.file}, block {number}")
