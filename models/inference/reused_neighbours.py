"""Batches of one structure whose neighbour list includes a skin, and is reused until an atom moves too far.

Pairs farther apart than the cutoff stay in the batch: the cutoff function makes their contribution exactly zero, and
the shape of the batch does not change, so that the model can be compiled.
"""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms

from hydrazero.models.inference.ase_structure import conditions_of, structure_from_atoms
from hydrazero.models.inference.potential import Potential
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, GraphSample, collate, graph_sample, shape_holding
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.structure import FloatArray

HEADROOM = 1.1
"""Factor by which a batch of fixed shape has more rows of slots than its first neighbour list needs."""


class ReusedNeighbours:
    """Make the batches of successive structures of a relaxation or of molecular dynamics."""

    def __init__(self, potential: Potential, task: str, skin: float, *, fixed_shape: bool = False) -> None:
        """Search for neighbours up to the cutoff plus `skin`, Å.

        With `fixed_shape`, the batch has spare rows, so that a slightly longer neighbour list still fits its shape.
        """
        self.potential, self.skin = potential, skin
        self._task = potential.task_index(task)
        self.fixed_shape = fixed_shape
        self.lists = 0
        """Number of neighbour searches so far."""
        self._sample: GraphSample | None = None
        self._batch: GraphBatch | None = None
        self._conditions = (0, 0)
        self._centre = np.zeros(3)

    @property
    def sample(self) -> GraphSample:
        """Structure and pairs of the last search; the distance of a pair is at most the cutoff plus the skin."""
        assert self._sample is not None
        return self._sample

    def batch(self, atoms: Atoms) -> GraphBatch:
        """Return the batch of a structure, the same object with new positions while the neighbour list is valid.

        The next call changes it, and one that fails leaves the last list as it was. Raises StructureError if the
        structure is not valid.
        """
        if not self._is_valid(atoms):
            self._search(atoms)
        assert self._batch is not None
        centred = torch.from_numpy(atoms.positions - self._centre)
        self._batch.positions[: len(atoms)] = centred.to(self._batch.positions)
        return self._batch

    def distances(self, positions: FloatArray) -> FloatArray:
        """Return the distances of the P pairs of the neighbour list at positions [A, 3] Å: [P] Å."""
        return self.sample.pairs.lengths(positions)

    def _is_valid(self, atoms: Atoms) -> bool:
        if self._sample is None:
            return False
        known = self._sample.structure
        if not np.array_equal(known.numbers, atoms.numbers) or self._conditions != conditions_of(atoms):
            return False
        if not np.array_equal(known.cell, atoms.cell[:]) or not np.array_equal(known.pbc, atoms.pbc):
            return False
        moved = atoms.positions - known.positions
        # Two atoms may approach each other by half the skin each. NaN compares as false, so it causes a search.
        return bool(np.einsum("ac,ac->a", moved, moved).max() <= (0.5 * self.skin) ** 2)

    def _search(self, atoms: Atoms) -> None:
        structure = structure_from_atoms(atoms)
        sample = graph_sample(structure, self._task, self.potential.cutoff + self.skin)
        shape = shape_holding([sample])
        if self.fixed_shape:
            shape = self._with_headroom(shape)
        batch = collate([sample], shape, self.potential.model.dtype).to(self.potential.device)
        # Only now, so that batch and sample belong together even after an error.
        self._batch, self._sample = batch, sample
        self._centre = structure.positions.mean(axis=0)
        self._conditions = (structure.charge, structure.multiplicity)
        self.lists += 1

    def _with_headroom(self, shape: BatchShape) -> BatchShape:
        """Return the shape of the last batch if it has enough slots, otherwise a new shape with spare rows."""
        if self._batch is not None and self._batch.numbers.shape[0] == shape.atoms:
            slots = self._batch.slot_mask.numel()
            if slots >= shape.slots:
                return BatchShape(structures=1, atoms=shape.atoms, slots=slots)
        rows = int(np.ceil(HEADROOM * shape.rows))
        return BatchShape(structures=1, atoms=shape.atoms, slots=rows * ROW_SLOTS)
