"""Structures per second and core through decoding, and through the whole input pipeline with neighbours."""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from ase.collections import g2
from timing import hand_over

from hydrazero.shards.block import block_from_structures, encode_block
from hydrazero.shards.block_reader import BlockReader
from hydrazero.shards.graph import BatchShape
from hydrazero.shards.manifest import Manifest, write_manifest
from hydrazero.shards.references import fit_reference_energies, label_ranges
from hydrazero.shards.stream import StreamSettings, TrainStream
from hydrazero.shards.structure import Structure
from hydrazero.shards.writer import write_split

STRUCTURES = 64 * 256
ATOMS = 20


def made_structures() -> list[Structure]:
    """Molecules of about ATOMS atoms: a g2 molecule in several copies side by side, rattled; made-up labels."""
    generator = np.random.default_rng(0)
    parents = [g2[name] for name in g2.names if 8 <= len(g2[name]) <= 14]
    structures = []
    for number in range(STRUCTURES):
        one, two = (parents[int(generator.integers(len(parents)))] for _ in range(2))
        positions = np.concatenate([one.positions, two.positions + np.array([0.0, 0.0, 6.0])])
        positions += 0.05 * generator.standard_normal(positions.shape)
        structures.append(
            Structure(
                numbers=np.concatenate([one.numbers, two.numbers]).astype(np.uint8),
                positions=positions,
                cell=np.zeros((3, 3)),
                pbc=np.zeros(3, dtype=bool),
                energy=float(generator.standard_normal()),
                forces=generator.standard_normal(positions.shape),
                source_id=f"made#{number}",
            )
        )
    return structures


def write_shards(folder: Path, structures: list[Structure]) -> None:
    shards = write_split(folder, "train", structures, "float32")
    references = fit_reference_energies(structures)
    manifest = Manifest(
        task="bench",
        splits={"train": shards},
        float_dtype="float32",
        elements={},
        trained_elements=sorted(references),
        size_histogram={ATOMS: len(structures)},
        labels=label_ranges(structures, references),
        reference_energies=references,
        required_labels=["energy", "forces"],
        periodic_structures=0,
    )
    write_manifest(manifest, folder)


def decode_rate(folder: Path) -> float:
    """Structures/s: tar read, checksum, columns."""
    reader = BlockReader(folder, "train")
    started = time.perf_counter()
    count = sum(len(reader.read(number)) for number in range(len(reader)))
    return count / (time.perf_counter() - started)


def pipeline_rate(folder: Path, batches: int = 60) -> float:
    """Structures/s: read, decode, neighbours at 5 Å, packed batch, in one process."""
    shape = BatchShape(structures=64, atoms=1024, slots=32768)
    stream = iter(TrainStream(StreamSettings(folders=(str(folder),), cutoff=5.0, shape=shape, workers=0), 0, 1))
    next(stream)
    started = time.perf_counter()
    count = sum(int(batch.structure_mask.sum()) for batch in islice(stream, batches))
    return count / (time.perf_counter() - started)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        structures = made_structures()
        write_shards(folder, structures)
        assert len(encode_block(block_from_structures(structures[:256]))) > 0
        decode_rate(folder)
        hand_over(
            {
                "decode": [decode_rate(folder) for _ in range(7)],
                "pipeline": [pipeline_rate(folder) for _ in range(3)],
            }
        )


if __name__ == "__main__":
    main()
