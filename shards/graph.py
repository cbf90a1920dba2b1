"""GraphBatch: structures of any tasks in arrays of a fixed size, with neighbour slots and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data

from hydrazero.shards.errors import StructureError
from hydrazero.shards.neighbours import Neighbours, neighbour_slots
from hydrazero.shards.structure import Structure

SLOT_CLASSES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Neighbour slots per atom that batches come with: few, so that a compiled step is compiled few times."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The most that a batch holds; what it doesn't fill is padding."""

    structures: int
    atoms: int
    slots: int
    """Atoms times neighbour slots per atom, so that batches of dense and of sparse structures cost the same."""

    def atoms_with(self, slots_per_atom: int) -> int:
        """Atoms of a batch whose atoms have that many slots."""
        return min(self.atoms, self.slots // slots_per_atom)


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphSample:
    """A structure with its neighbours, ready to be packed."""

    structure: Structure
    neighbours: Neighbours
    task: int
    slot_class: int
    """Smallest of SLOT_CLASSES that holds its neighbours."""
    origin: tuple[int, ...] = ()
    """Where in the stream it came from."""


class GraphBatch(Data):
    """A batch of S structures, A atoms, K slots per atom, all padded to a fixed size.

    numbers [A] int64 (0 where padded), positions [A, 3] Å, neighbours [A, K] int64 (an empty slot points at its own
    atom), shifts [A, K, 3] Å, reverse [A, K] int64 (flat index of the slot that holds the opposite pair; itself where
    empty), slot_mask [A, K], atom_mask [A], structure [A] int64 (index of the atom's structure), task [S] int64,
    structure_mask [S], n_atoms [S] int64, cell [S, 3, 3] Å, volume [S] Å³ (1 where not periodic in 3 directions),
    periodic [S], charge [S], multiplicity [S]; labels: energy [S] eV float64 with energy_mask [S], forces [A, 3] eV/Å
    with forces_mask [A], stress [S, 3, 3] eV/Å³ with stress_mask [S].
    """

    def source_ids(self) -> list[str]:
        """Names of the structures in the batch, without the padding."""
        return list(self.names)


def graph_sample(structure: Structure, task: int, cutoff: float, origin: tuple[int, ...] = ()) -> GraphSample:
    """Find the neighbours of a structure within `cutoff` Å; raises StructureError if there are too many."""
    neighbours = neighbour_slots(structure.positions, structure.cell, structure.pbc, cutoff)
    degree = neighbours.max_degree
    if degree > SLOT_CLASSES[-1]:
        raise StructureError(
            "too_dense", f"an atom has {degree} neighbours within {cutoff} Å (most: {SLOT_CLASSES[-1]})"
        )
    slot_class = next(k for k in SLOT_CLASSES if k >= degree)
    return GraphSample(structure=structure, neighbours=neighbours, task=task, slot_class=slot_class, origin=origin)


def collate(samples: Sequence[GraphSample], shape: BatchShape, slots: int, dtype: torch.dtype) -> GraphBatch:
    """Lay samples out in one batch of `shape.structures` structures, `shape.atoms_with(slots)` atoms, `slots` slots.

    `dtype` is that of positions, shifts, forces and stress; energies stay float64. The samples must fit.
    """
    n_structures, n_atoms = shape.structures, shape.atoms_with(slots)
    arrays = _empty_arrays(n_structures, n_atoms, slots)
    first = 0
    for row, sample in enumerate(samples):
        _place_structure(arrays, sample, row, first)
        _place_neighbours(arrays, sample.neighbours, first, slots)
        first += len(sample.structure)
    floats = {"positions", "shifts", "forces", "stress", "cell", "volume"}
    tensors: dict[str, Any] = {
        name: torch.from_numpy(value).to(dtype) if name in floats else torch.from_numpy(value)
        for name, value in arrays.items()
    }
    batch = GraphBatch(**tensors)
    batch.names = [sample.structure.source_id for sample in samples]
    return batch


def _empty_arrays(n_structures: int, n_atoms: int, slots: int) -> dict[str, np.ndarray]:
    atom = np.arange(n_atoms, dtype=np.int64)
    return {
        "numbers": np.zeros(n_atoms, dtype=np.int64),
        "positions": np.zeros((n_atoms, 3)),
        "neighbours": np.repeat(atom[:, None], slots, axis=1),
        "shifts": np.zeros((n_atoms, slots, 3)),
        "reverse": np.arange(n_atoms * slots, dtype=np.int64).reshape(n_atoms, slots),
        "slot_mask": np.zeros((n_atoms, slots), dtype=bool),
        "atom_mask": np.zeros(n_atoms, dtype=bool),
        "structure": np.zeros(n_atoms, dtype=np.int64),
        "task": np.zeros(n_structures, dtype=np.int64),
        "structure_mask": np.zeros(n_structures, dtype=bool),
        "n_atoms": np.zeros(n_structures, dtype=np.int64),
        "cell": np.zeros((n_structures, 3, 3)),
        "volume": np.ones(n_structures),
        "periodic": np.zeros(n_structures, dtype=bool),
        "charge": np.zeros(n_structures, dtype=np.int64),
        "multiplicity": np.zeros(n_structures, dtype=np.int64),
        "energy": np.zeros(n_structures, dtype=np.float64),
        "energy_mask": np.zeros(n_structures, dtype=bool),
        "forces": np.zeros((n_atoms, 3)),
        "forces_mask": np.zeros(n_atoms, dtype=bool),
        "stress": np.zeros((n_structures, 3, 3)),
        "stress_mask": np.zeros(n_structures, dtype=bool),
    }


def _place_structure(arrays: dict[str, np.ndarray], sample: GraphSample, row: int, first: int) -> None:
    structure = sample.structure
    atoms = slice(first, first + len(structure))
    arrays["numbers"][atoms] = structure.numbers
    arrays["positions"][atoms] = structure.positions
    arrays["atom_mask"][atoms] = True
    arrays["structure"][atoms] = row
    arrays["task"][row] = sample.task
    arrays["structure_mask"][row] = True
    arrays["n_atoms"][row] = len(structure)
    arrays["cell"][row] = structure.cell
    if structure.pbc.all():
        arrays["periodic"][row] = True
        arrays["volume"][row] = abs(np.linalg.det(structure.cell))
    arrays["charge"][row] = structure.charge
    arrays["multiplicity"][row] = structure.multiplicity
    if structure.energy is not None:
        arrays["energy"][row] = structure.energy
        arrays["energy_mask"][row] = True
    if structure.forces is not None:
        arrays["forces"][atoms] = structure.forces
        arrays["forces_mask"][atoms] = True
    if structure.stress is not None and structure.pbc.all():
        arrays["stress"][row] = structure.stress
        arrays["stress_mask"][row] = True


def _place_neighbours(arrays: dict[str, np.ndarray], pairs: Neighbours, first: int, slots: int) -> None:
    receiver = pairs.receiver + first
    arrays["neighbours"][receiver, pairs.slot] = pairs.sender + first
    arrays["shifts"][receiver, pairs.slot] = pairs.shift
    arrays["slot_mask"][receiver, pairs.slot] = True
    flat = receiver * slots + pairs.slot
    arrays["reverse"].reshape(-1)[flat] = flat[pairs.reverse]
