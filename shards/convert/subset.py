"""Subsets of a task, written as shards with a manifest of their own, for learning curves and quick tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from hydrazero.shards.block import BLOCK_STRUCTURES, StructureBlock, block_from_structures
from hydrazero.shards.convert.element_pairs import closest_pairs
from hydrazero.shards.convert.label_statistics import label_statistics, residuals_of, target_statistics
from hydrazero.shards.convert.references import chosen_references, undetermined_sums
from hydrazero.shards.convert.task_statistics import Statistics, isolated_atoms
from hydrazero.shards.convert.writer import BLOCKS_PER_SHARD, write_shard
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import replacing
from hydrazero.shards.manifest import SPLITS, Manifest, read_manifest, write_manifest
from hydrazero.shards.manifest_parts import Shard
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.structure import Structure


def write_subset(folder: Path | str, out: Path, counts: Mapping[str, int], seed: int = 0) -> Manifest:
    """Write a random subset of a task into the new folder `out`, and return its manifest.

    `counts` is split -> number of structures; splits that it does not name are taken over completely. With the same
    seed, a smaller subset is part of a larger one. Reference energies and statistics are those of the subset. Raises
    ConfigError for an `out` that exists, an unknown split or a count that is too large, ShardError for shards that
    cannot be read.
    """
    manifest = read_manifest(folder)
    for split, count in counts.items():
        there = manifest.structures(split)
        if split not in SPLITS or not (split == "train") <= count <= there:
            raise ConfigError(f"{folder} has {there:,} structures in the split '{split}', not {count:,} to take.")
    if out.exists():
        raise ConfigError(f"output folder {out} exists; remove it or choose another name.")
    try:
        with replacing(out, shared=True) as part:
            part.mkdir(parents=True)
            return _write(manifest, folder, part, counts, seed)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}).") from error


def _write(manifest: Manifest, folder: Path | str, part: Path, counts: Mapping[str, int], seed: int) -> Manifest:
    total, splits = Statistics(), {}
    cutoffs = [float(cutoff) for cutoff in manifest.degrees]
    extensive = [name for name, target in manifest.targets.items() if target.extensive]
    for split in SPLITS:
        structures = _chosen(BlockReader(folder, split), counts.get(split), seed)
        blocks = [
            block_from_structures(structures[first : first + BLOCK_STRUCTURES], float_dtype=manifest.float_dtype)
            for first in range(0, len(structures), BLOCK_STRUCTURES)
        ]
        splits[split] = _shards(part, split, blocks)
        for block in blocks:
            total.add(block, split, cutoffs, extensive)
    isolated = isolated_atoms(total)
    references = chosen_references(total.triangle, isolated, manifest.references, manifest.task)
    residuals = [residuals_of(part, shard, references, cutoffs) for shards in splits.values() for shard in shards]
    found = label_statistics(total, residuals if references else [], len(splits["train"]))
    taken = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    subset = replace(
        manifest,
        splits=splits,
        elements={chemical_symbols[z]: count for z, count in sorted(total.elements.items())},
        trained_elements=sorted(references or (chemical_symbols[z] for z in total.trained)),
        size_histogram=dict(sorted(total.sizes.items())),
        labels=found.labels,
        bound_residual_rms=found.bound_residual_rms,
        reference_energies=references,
        isolated_atoms=isolated,
        undetermined_sums=undetermined_sums(total.triangle),
        unused_stresses=total.unused_stresses,
        periodic_structures=total.periodic,
        targets={
            name: target_statistics(moments, of=old.of, kind=old.kind, unit=old.unit, extensive=old.extensive)
            for name, old in manifest.targets.items()
            if (moments := total.targets.get(name)) is not None and moments.count
        },
        charged_structures=total.charged,
        multiplicity_known=total.multiplicity_known,
        degrees={f"{cutoff:g}": degrees for cutoff, degrees in total.degrees.items()},
        closest=closest_pairs(total.closest),
        closest_within=max(cutoffs, default=0.0),
        distributions=found.distributions,
        outliers=found.outliers,
        duplicates=[],
        duplicate_count=0,
        set_aside={},
        source={**manifest.source, "subset": f"{taken or 'all'} of {folder}, seed {seed}"},
    )
    write_manifest(subset, part)
    return subset


def _chosen(reader: BlockReader, count: int | None, seed: int) -> list[Structure]:
    """Read the first `count` structures of a shuffled split, or all of them in their order if `count` is None."""
    sizes = reader.block_sizes
    places = [(block, row) for block, size in enumerate(sizes) for row in range(int(size))]
    if count is None:
        order = list(range(len(places)))
    else:
        # NumPy guarantees that this generator's numbers never change.
        order = np.random.RandomState(seed).permutation(len(places))[:count].tolist()
    found: dict[int, Structure] = {}
    read: tuple[int, StructureBlock] | None = None
    for place in sorted(order):  # so that each block is read once
        block, row = places[place]
        if read is None or read[0] != block:
            read = block, reader.read(block)
        found[place] = read[1].structure(row)
    return [found[place] for place in order]


def _shards(part: Path, split: str, blocks: list[StructureBlock]) -> list[Shard]:
    return [
        write_shard(part / f"{split}-{number:06d}.tar", blocks[first : first + BLOCKS_PER_SHARD])
        for number, first in enumerate(range(0, len(blocks), BLOCKS_PER_SHARD))
    ]
