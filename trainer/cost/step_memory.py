"""Estimate the memory of a training step from small batches, scaled to the size of a full batch."""

from __future__ import annotations

import os
import resource

import numpy as np
import torch

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.task_facts import TaskFacts
from hydrazero.shards.device import gpu_module
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, collate, graph_sample
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.structure import Structure

PEAK_OVER_KEPT = 1.6
"""Peak memory of a step over what autograd keeps for the backward passes: working copies come on top (measured, see
CONTRIBUTING.md)."""

SHARE = 0.6
"""Fraction of the free memory that a batch may take; parameters, optimizer, buffers and the stream need the rest."""


def memory_at_hand(ranks: int) -> int:
    """Return the bytes that each of `ranks` ranks of this machine can use, on its GPU or of the host's memory."""
    if (gpu := gpu_module()) is not None:
        return int(gpu.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(ranks, 1)


def peak_memory_mb() -> float:
    """Return the peak memory of this rank so far in MB: that allocated on its GPU, or the process's resident memory."""
    if (gpu := gpu_module()) is not None:
        return float(gpu.max_memory_allocated() / 1e6)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


class StepMemory:
    """Memory of a training step with forces, as a linear function of the numbers of atoms and neighbour slots."""

    def __init__(self, settings: ModelSettings) -> None:
        # The heads of targets take little memory beside the encoder. An atom passes the head of one task.
        self._model = AtomisticModel(settings.model_copy(update={"attention_targets": ()}), probe_tasks(1)).train()
        small, wide = (self._kept(atoms, spare) for atoms, spare in ((32, 0), (32, 64)))
        more = self._kept(64, 0)
        self.per_slot = (wide[0] - small[0]) / (wide[2] - small[2])
        self.per_atom = (more[0] - small[0] - self.per_slot * (more[2] - small[2])) / (more[1] - small[1])

    def _kept(self, atoms: int, spare_rows: int) -> tuple[int, int, int]:
        """Return the bytes kept for the backward pass, and the batch's numbers of atoms and slots."""
        batch = probe_batch(atoms, spare_rows, self._model.settings.encoder.cutoff)
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predictions = self._model(batch)
            loss = predictions.interaction.square().sum() + predictions.forces.square().sum()
        del loss
        return sum(storages.values()), len(batch.numbers), batch.slot_mask.numel()

    def bytes_of(self, shape: BatchShape) -> float:
        """Return the peak memory in bytes of a step with a batch of this shape."""
        return PEAK_OVER_KEPT * (self.per_atom * shape.atoms + self.per_slot * shape.rows * ROW_SLOTS)


def probe_tasks(count: int) -> list[TaskFacts]:
    """Return facts of a number of tasks about which nothing is known."""
    return [TaskFacts(name=f"probe{n}", reference_energies={}, scale=1.0, elements=["C"]) for n in range(count)]


def probe_batch(atoms: int, spare_rows: int, cutoff: float) -> GraphBatch:
    """Return a batch with a line of carbon atoms and additional rows of empty neighbour slots."""
    positions = np.zeros((atoms, 3))
    positions[:, 0] = 1.4 * np.arange(atoms)
    structure = Structure(
        numbers=np.full(atoms, 6, dtype=np.uint8),
        positions=positions,
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, dtype=bool),
    )
    sample = graph_sample(structure, 0, cutoff)
    shape = BatchShape(structures=1, atoms=atoms, slots=(sample.rows + spare_rows) * ROW_SLOTS)
    return collate([sample], shape, torch.float32)
