"""Fill of batches of the sixteen real tasks, and a simulation of the imbalance of ranks on the largest machine."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from timing import hand_over

from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.stream.batch_proposal import Demand, demand_of, fill_of, propose, simulate
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, TrainStream

CUTOFF = 5.0
RANKS = 16_384
STRUCTURES = 48
STEPS = 6
COUNTED = 2
"""Number of final steps that count; the first steps choose from more structures, and fill batches better."""


def real_fill(folders: tuple[str, ...], shape: BatchShape) -> tuple[float, float, float]:
    """Return the fractions of atoms and slots that real batches fill, and the largest batch's edges over the mean."""
    settings = StreamSettings(folders=folders, cutoff=CUTOFF, shape=shape, workers=0)
    held = []
    for _, batch in zip(range(120), TrainStream(settings, 0, 1), strict=False):
        rows = int((batch.slot_mask.any(dim=1)).sum())
        held.append((len(batch.names), int(batch.atom_mask.sum()), rows, int(batch.slot_mask.sum())))
    fill = fill_of(np.array(held), shape)
    return fill.atoms, fill.slots, fill.edges_spread


def imbalance(demand: Demand, shape: BatchShape) -> float:
    """Return the maximum number of edges of a rank over the mean of all ranks, averaged over steps."""
    edges = np.zeros((RANKS, STEPS))
    for rank in range(RANKS):
        edges[rank] = simulate(demand, shape, np.random.default_rng(rank), STEPS)[:, 3]
    return float((edges.max(axis=0) / edges.mean(axis=0))[-COUNTED:].mean())


def main() -> None:
    folders = tuple(
        str(folder) for folder in sorted(Path(sys.argv[1]).iterdir()) if (folder / "manifest.json").exists()
    )
    settings = StreamSettings(
        folders=folders, cutoff=CUTOFF, shape=BatchShape(structures=1, atoms=1, slots=8), workers=0
    )
    reader = SplitReader(settings, "train")
    demand = demand_of(reader)
    shape = propose(demand, reader, STRUCTURES)
    atoms, slots, spread = real_fill(folders, shape)
    hand_over(
        {
            "tasks": [float(len(folders))],
            "packing_fill": [atoms],
            "slot_fill": [slots],
            "edges_spread": [spread],
            "simulated_imbalance": [imbalance(demand, shape)],
        }
    )


if __name__ == "__main__":
    main()
