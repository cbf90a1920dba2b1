"""Shards of the structures of a benchmark, written without the checks of a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ase.data import chemical_symbols

from hydrazero.shards.block import block_from_structures
from hydrazero.shards.convert.task_statistics import Statistics
from hydrazero.shards.convert.writer import write_shard
from hydrazero.shards.manifest import Manifest, write_manifest
from hydrazero.shards.structure import Structure


def write_bench_shards(folder: Path, structures: Sequence[Structure], block: int) -> None:
    """Write structures to a new folder of one shard, in blocks of `block` structures."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [block_from_structures(structures[first : first + block]) for first in range(0, len(structures), block)]
    shard = write_shard(folder / "train-000000.tar", blocks)
    total = Statistics()
    for each in blocks:
        total.add(each, "train", ())
    labels = {name: moments.label_range() for name, moments in total.moments.items() if moments.count}
    manifest = Manifest(
        task="bench",
        splits={"train": [shard]},
        float_dtype="float32",
        elements={chemical_symbols[number]: count for number, count in total.elements.items()},
        trained_elements=[],
        size_histogram=dict(total.sizes),
        labels=labels,
        reference_energies={},
        required_labels=[name for name in ("energy", "forces") if name in labels],
        periodic_structures=total.periodic,
    )
    write_manifest(manifest, folder)
