"""The batch of one structure whose neighbours are found with a skin, and used again while no atom moves far.

Pairs between the cutoff and the skin's end stay in the batch: the cutoff function makes what they add exactly zero, and
the shape of the batch stays the same, so that steps can be compiled.
"""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms

from hydrazero.models.inference.potential import Potential, structure_from_atoms
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, GraphSample, collate, graph_sample, shape_holding
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.structure import FloatArray

HEADROOM = 1.1
"""Rows of slots, over those of the first list, of a batch that shall keep its shape."""


class ReusedNeighbours:
    """Batches of structures that follow each other, as in relaxations and dynamics."""

    def __init__(self, potential: Potential, task: str, skin: float, *, fixed_shape: bool = False) -> None:
        """Find neighbours within the cutoff and `skin`, Å; with a fixed shape, lists that grow a little still fit."""
        self.potential, self.skin = potential, skin
        self._task = potential.task_index(task)
        self.fixed_shape = fixed_shape
        self.lists = 0
        """Times that neighbours were searched."""
        self._sample: GraphSample | None = None
        self._batch: GraphBatch | None = None
        self._conditions: tuple[object, object] = (0, 0)
        self._centre = np.zeros(3)

    @property
    def sample(self) -> GraphSample:
        """Structure and pairs of the last list; pairs may be as far apart as the cutoff and the skin."""
        assert self._sample is not None
        return self._sample

    def batch(self, atoms: Atoms) -> GraphBatch:
        """Return the batch of a structure; it is the same object, with other positions, while the list holds.

        Raises StructureError if the structure cannot be used.
        """
        if not self._holds(atoms):
            self._find(atoms)
        assert self._batch is not None
        centred = torch.from_numpy(atoms.positions - self._centre)
        self._batch.positions[: len(atoms)] = centred.to(self._batch.positions)
        return self._batch

    def distances(self, positions: FloatArray) -> FloatArray:
        """Return the lengths of the list's pairs at positions [A, 3]: Å, [P]."""
        pairs = self.sample.pairs
        between = positions[pairs.second] - positions[pairs.first]
        if pairs.shift is not None:
            between += pairs.shift
        lengths: FloatArray = np.sqrt(np.einsum("pc,pc->p", between, between))
        return lengths

    def _holds(self, atoms: Atoms) -> bool:
        if self._sample is None:
            return False
        known = self._sample.structure
        if not np.array_equal(known.numbers, atoms.numbers) or self._conditions != _conditions(atoms):
            return False
        if not np.array_equal(known.cell, atoms.cell[:]) or not np.array_equal(known.pbc, atoms.pbc):
            return False
        moved = atoms.positions - known.positions
        # Two atoms that move towards each other by half the skin each; NaN is not below it either.
        return bool(np.einsum("ac,ac->a", moved, moved).max() <= (0.5 * self.skin) ** 2)

    def _find(self, atoms: Atoms) -> None:
        structure = structure_from_atoms(atoms)
        sample = graph_sample(structure, self._task, self.potential.cutoff + self.skin)
        shape = shape_holding([sample])
        if self.fixed_shape:
            shape = self._roomy(shape)
        self._batch = collate([sample], shape, self.potential.model.dtype).to(self.potential.device)
        self._centre = structure.positions.mean(axis=0)
        self._conditions = _conditions(atoms)
        self._sample = sample
        self.lists += 1

    def _roomy(self, shape: BatchShape) -> BatchShape:
        """Return the shape of the last batch if its slots do, else one with headroom."""
        if self._batch is not None and self._batch.numbers.shape[0] == shape.atoms:
            slots = self._batch.slot_mask.numel()
            if slots >= shape.slots:
                return BatchShape(structures=1, atoms=shape.atoms, slots=slots)
        rows = int(np.ceil(HEADROOM * shape.rows))
        return BatchShape(structures=1, atoms=shape.atoms, slots=rows * ROW_SLOTS)


def _conditions(atoms: Atoms) -> tuple[object, object]:
    return atoms.info.get("charge", 0), atoms.info.get("multiplicity", 0)
