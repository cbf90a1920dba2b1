"""Which batch suits a number of tasks: from a sample of their structures, packed as the stream packs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.stream.budget import degrees_within
from hydrazero.shards.stream.deal import mixture_repeats
from hydrazero.shards.stream.packing import LOOK_AHEAD, choose
from hydrazero.shards.stream.stream import SplitReader

SAMPLED = 512
"""Structures of each task that are looked at."""

ROOM_ATOMS, ROOM_SLOTS = 1.02, 1.03
"""Atoms and slots for each edge, over their means: with a little of both to spare, batches fill up evenly with edges
(sixteen datasets, 48 structures a batch: 97% of the atoms, 86% of the slots, edges at most 1.01 times their mean)."""

SIMULATED_BATCHES = 50


@dataclass(frozen=True, kw_only=True)
class Fill:
    """How full simulated batches are, as shares of what they hold."""

    structures: float
    atoms: float
    slots: float
    """Neighbours over slots."""
    edges_spread: float
    """Most edges of a batch over the mean."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What structures take of a batch, in the mixture that the stream delivers."""

    tasks: tuple[NDArray[np.int64], ...]
    """Of each task, a sample: rows (1, atoms, rows of slots, edges)."""
    shares: NDArray[np.float64]
    """Of each task among the structures delivered."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean (1, atoms, rows, edges) of a structure."""
        return sum(
            (share * task.mean(axis=0) for share, task in zip(self.shares, self.tasks, strict=True)), np.zeros(4)
        )

    @property
    def largest(self) -> NDArray[np.int64]:
        """Most (1, atoms, rows, edges) of any structure in the samples."""
        return np.max([task.max(axis=0) for task in self.tasks], axis=0)

    def draw(self, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Draw structures of the mixture: [count, 4]."""
        chosen = generator.choice(len(self.tasks), size=count, p=self.shares)
        drawn = np.empty((count, 4), dtype=np.int64)
        for index, task in enumerate(self.tasks):
            mine = chosen == index
            drawn[mine] = task[generator.integers(len(task), size=int(mine.sum()))]
        return drawn


def demand_of(reader: SplitReader) -> Demand:
    """Look at a sample of each task's structures, spread over its blocks; raises ShardError for damaged shards."""
    samples, counts = [], []
    for task, blocks in enumerate(reader.readers):
        sizes = blocks.block_sizes
        if not len(sizes):
            raise ShardError(f"{blocks.folder} has no structures in the split '{blocks.split}'.")
        chosen = np.unique(np.linspace(0, len(sizes) - 1, num=8).astype(int))
        per_block = -(-SAMPLED // len(chosen))
        rows = []
        for block in chosen.tolist():
            for row in range(min(per_block, int(sizes[block]))):
                sample = reader.sample(task, block, row)
                rows.append((1, len(sample.structure), sample.rows, sample.edges))
        samples.append(np.array(rows, dtype=np.int64))
        counts.append(int(sizes.sum()))
    shares = np.array(mixture_repeats(counts, reader.settings.temperature, reader.settings.shares)) * counts
    return Demand(tasks=tuple(samples), shares=shares / shares.sum())


def propose(demand: Demand, reader: SplitReader, structures: int) -> BatchShape:
    """Return a shape for about so many structures a batch, in which the largest structure of every task fits.

    Raises ConfigError if the manifests have no counts of neighbours for the cutoff.
    """
    atoms, edges = 0, 0
    slots = 0
    for blocks in reader.readers:
        found = degrees_within(blocks.manifest, reader.settings.cutoff)
        if found is None:
            raise ConfigError(
                f"{blocks.folder} has no counts of neighbours within {reader.settings.cutoff:g} Å; convert it again "
                f"with degree_cutoffs = [{reader.settings.cutoff:g}]."
            )
        atoms = max(atoms, blocks.manifest.max_atoms)
        slots, edges = max(slots, found[1].most_slots), max(edges, found[1].most_edges)
    _, mean_atoms, mean_rows, mean_edges = demand.mean.tolist()
    # In proportion to each other, however large the largest structure makes the batch.
    scale = max(structures, atoms / mean_atoms, slots / (mean_rows * ROW_SLOTS), edges / max(mean_edges, 1e-9))
    return BatchShape(
        structures=int(np.ceil(2 * scale)),
        atoms=int(np.ceil(ROOM_ATOMS * scale * mean_atoms)),
        slots=int(np.ceil(ROOM_SLOTS * scale * mean_rows)) * ROW_SLOTS,
        edges=int(np.ceil(scale * mean_edges)),
    )


def simulate(
    demand: Demand, shape: BatchShape, generator: np.random.Generator, batches: int = SIMULATED_BATCHES
) -> NDArray[np.int64]:
    """Pack drawn structures as the stream does: sums of (1, atoms, rows, edges) in each batch, [batches, 4]."""
    budget = np.array([shape.structures, shape.atoms, shape.rows, shape.most_edges], dtype=np.float64)
    pool = np.zeros((0, 4), dtype=np.int64)
    held = np.zeros((batches, 4), dtype=np.int64)
    for batch in range(batches):
        while (pool / budget).sum(axis=0).max(initial=0.0) < LOOK_AHEAD:
            drawn = demand.draw(16, generator)
            pool = np.concatenate([pool, drawn[(drawn <= budget).all(axis=1)]])
        chosen = choose(pool / budget)
        held[batch] = pool[chosen].sum(axis=0)
        pool = np.delete(pool, chosen, axis=0)
    return held


def fill_of(held: Sequence[NDArray[np.int64]] | NDArray[np.int64], shape: BatchShape) -> Fill:
    """Return how full batches are that hold (structures, atoms, rows, edges)."""
    structures, atoms, _, edges = np.asarray(held, dtype=np.float64).T
    return Fill(
        structures=float(structures.mean() / shape.structures),
        atoms=float(atoms.mean() / shape.atoms),
        slots=float(edges.mean() / shape.slots),
        edges_spread=float(edges.max() / edges.mean()),
    )
