"""Proposal of a batch size for some tasks, from samples of their structures that are packed as in training."""

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
"""Number of structures of each task in the sample."""

ROOM_ATOMS, ROOM_SLOTS = 1.02, 1.03
"""Room for atoms and slots relative to their means per edge. With a little of both to spare, all batches have nearly
the same number of edges (sixteen datasets, 48 structures per batch: 97% of the atoms and 86% of the slots are used,
and the number of edges is at most 1.01 times its mean)."""

SIMULATED_BATCHES = 50


@dataclass(frozen=True, kw_only=True)
class Fill:
    """Used fractions of simulated batches."""

    structures: float
    atoms: float
    slots: float
    """Number of neighbours divided by the number of slots."""
    edges_spread: float
    """Largest number of edges of a batch divided by the mean."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Sizes of structures in the mixture of tasks that the stream delivers."""

    tasks: tuple[NDArray[np.int64], ...]
    """Sample of each task, [structures, 4]: columns are 1, atoms, rows of slots, edges."""
    shares: NDArray[np.float64]
    """Share of each task among the structures that are delivered, [tasks]."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Means of 1, atoms, rows and edges per structure, [4]."""
        return sum(
            (share * task.mean(axis=0) for share, task in zip(self.shares, self.tasks, strict=True)), np.zeros(4)
        )

    @property
    def largest(self) -> NDArray[np.int64]:
        """Maxima of 1, atoms, rows and edges of the structures in the samples, [4]."""
        return np.max([task.max(axis=0) for task in self.tasks], axis=0)

    def draw(self, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return random structures of the mixture, [count, 4]."""
        chosen = generator.choice(len(self.tasks), size=count, p=self.shares)
        drawn = np.empty((count, 4), dtype=np.int64)
        for index, task in enumerate(self.tasks):
            mine = chosen == index
            drawn[mine] = task[generator.integers(len(task), size=int(mine.sum()))]
        return drawn


def demand_of(reader: SplitReader) -> Demand:
    """Return the sizes of a sample of each task, spread over its blocks; raise ShardError for damaged shards."""
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
    """Return a batch size for about the given number of structures, which can hold every structure of the tasks.

    Raises ConfigError if a manifest has no numbers of neighbours within the cutoff.
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
    # Atoms, slots and edges keep their proportions, even if one large structure determines the size. Where no structure
    # has neighbours, as isolated atoms have none, there is nothing to keep, and one row of slots is the least.
    scale = max(structures, atoms / mean_atoms)
    if mean_rows and mean_edges:
        scale = max(scale, slots / (mean_rows * ROW_SLOTS), edges / mean_edges)
    return BatchShape(
        structures=int(np.ceil(2 * scale)),
        atoms=int(np.ceil(ROOM_ATOMS * scale * mean_atoms)),
        slots=max(int(np.ceil(ROOM_SLOTS * scale * mean_rows)), 1) * ROW_SLOTS,
        edges=int(np.ceil(scale * mean_edges)),
    )


def simulate(
    demand: Demand, shape: BatchShape, generator: np.random.Generator, batches: int = SIMULATED_BATCHES
) -> NDArray[np.int64]:
    """Pack random structures as the stream does; return sums of 1, atoms, rows and edges per batch, [batches, 4]."""
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
    """Return the used fractions of batches with the given structures, atoms, rows and edges, [batches, 4]."""
    structures, atoms, _, edges = np.asarray(held, dtype=np.float64).T
    return Fill(
        structures=float(structures.mean() / shape.structures),
        atoms=float(atoms.mean() / shape.atoms),
        slots=float(edges.mean() / shape.slots),
        edges_spread=float(edges.max() / edges.mean()) if edges.any() else 1.0,
    )
