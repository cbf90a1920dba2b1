"""Time of neighbour lists on a GPU, without and with their layout in slots, for batches of 64-atom cells at 5 Å."""

from __future__ import annotations

import sys

import numpy as np
import torch
from ase.build import bulk
from systems import CUTOFF
from timing import hand_over, step_seconds

from hydrazero.models.inference.potential import structure_from_atoms
from hydrazero.shards.graphs.device_neighbours import find_neighbours, neighbour_engine
from hydrazero.shards.graphs.graph import GraphBatch, collate, graph_sample, shape_holding

CELLS = 4096


def batch_of(count: int) -> GraphBatch:
    """Return a batch of rattled cells of 64 silicon atoms."""
    cells = []
    for seed in range(16):
        atoms = bulk("Si", cubic=True) * (2, 2, 2)
        atoms.rattle(0.05, seed=seed)
        cells.append(graph_sample(structure_from_atoms(atoms), 0, CUTOFF))
    samples = [cells[number % len(cells)] for number in range(count)]
    batch = collate(samples, shape_holding(samples), torch.float32)
    batch.pbc = torch.from_numpy(np.ones((count, 3), dtype=bool))
    return batch.to("cuda")


def main() -> None:
    repeats = int(sys.argv[1])
    batch = batch_of(CELLS)
    rows, atoms = len(batch.row_atom), len(batch.numbers)
    ends = batch.n_atoms.cumsum(0).to(torch.int32)
    engine, structure = neighbour_engine(), batch.structure.to(torch.int32)
    starts = torch.cat([ends.new_zeros(1), ends])

    def found() -> None:
        engine(batch.positions, CUTOFF, cell=batch.cell, pbc=batch.pbc, batch_idx=structure, batch_ptr=starts)
        torch.cuda.synchronize()

    def laid_out() -> None:
        find_neighbours(batch, rows, CUTOFF)
        torch.cuda.synchronize()

    seconds = {name: step_seconds(step, repeats) for name, step in (("lists", found), ("slots", laid_out))}
    hand_over({name: [value / atoms for value in values] for name, values in seconds.items()})


if __name__ == "__main__":
    main()
