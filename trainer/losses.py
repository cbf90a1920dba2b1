"""Per-task losses as sums and counts, so that they do not depend on how the work is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hydrazero.models.atomistic import AtomisticModel, Predictions
from hydrazero.shards.graph import GraphBatch
from hydrazero.trainer.config import LossSection, RunConfig

COLUMNS = ("energy_loss", "energy_count", "forces_loss", "forces_count", "energy_error", "forces_error", "structures")
"""Of a table of sums [tasks, columns]: losses of scaled errors, counts, absolute errors (eV per atom, eV/Å)."""
COUNT_COLUMNS = (1, 3, 6)


def pointwise_loss(error: Tensor, settings: LossSection) -> Tensor:
    """Apply L1, L2 or Huber (slope 1 far out, as L1) to each error."""
    if settings.kind == "l1":
        return error.abs()
    if settings.kind == "l2":
        return error * error
    return functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=settings.huber_delta) / (
        settings.huber_delta
    )


def count_labels(batch: GraphBatch, tasks: int) -> Tensor:
    """Return the labels of a batch by task: [tasks, 3] float64, energies, force components, structures."""
    atom_task = batch.task[batch.structure]
    columns = [
        _by_task(batch.energy_mask, batch.task, tasks),
        3.0 * _by_task(batch.forces_mask, atom_task, tasks),
        _by_task(batch.structure_mask, batch.task, tasks),
    ]
    return torch.stack(columns, dim=1)


def _by_task(values: Tensor, task: Tensor, tasks: int) -> Tensor:
    # A product with ones and zeros instead of a scatter: in a fixed order on every device.
    member = functional.one_hot(task, tasks).to(torch.float64)
    return values.to(torch.float64) @ member


def leave_out_unseen(batch: GraphBatch, known: Tensor) -> Tensor:
    """Mask every label of structures with an element that their task has not been trained on.

    `known` [tasks, 119] says which elements are; such a structure has no reference energy, so its error would be that
    of a total energy. Returns how many they are by task, [tasks] float64.
    """
    strange = ~known[batch.task[batch.structure], batch.numbers] & batch.atom_mask
    atoms = torch.zeros(len(batch.task), device=strange.device).index_add(0, batch.structure, strange.float())
    unseen = (atoms > 0) & batch.structure_mask
    batch.structure_mask = batch.structure_mask & ~unseen
    batch.energy_mask = batch.energy_mask & ~unseen
    batch.forces_mask = batch.forces_mask & ~unseen[batch.structure]
    return _by_task(unseen, batch.task, len(known))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a run: weights of tasks and of their parts."""

    settings: LossSection
    task_weights: Tensor
    """[tasks] float64."""
    scales: Tensor
    """Unit of each task's errors, [tasks] float64: eV/Å for forces, eV for the energy per atom."""

    def sums(self, predictions: Predictions, batch: GraphBatch) -> Tensor:
        """Return the table of sums of a batch, [tasks, len(COLUMNS)] float64, with a graph through both losses."""
        tasks, atom_task = len(self.task_weights), batch.task[batch.structure]
        # References are subtracted in float64; what is left is small enough for the model's precision.
        target = (batch.energy - predictions.reference).to(predictions.interaction.dtype)
        energy_error = (predictions.interaction - target) * batch.energy_mask / batch.n_atoms.clamp(min=1)
        forces_error = (predictions.forces - batch.forces) * batch.forces_mask.unsqueeze(1)
        scales = self.scales.to(energy_error.dtype)
        energy_loss = pointwise_loss(energy_error / scales[batch.task], self.settings)
        forces_loss = pointwise_loss(forces_error / scales[atom_task].unsqueeze(1), self.settings).sum(1)
        counts = count_labels(batch, tasks)
        columns = [
            _by_task(energy_loss, batch.task, tasks),
            counts[:, 0],
            _by_task(forces_loss, atom_task, tasks),
            counts[:, 1],
            _by_task(energy_error.detach().abs(), batch.task, tasks),
            _by_task(forces_error.detach().abs().sum(1), atom_task, tasks),
            counts[:, 2],
        ]
        return torch.stack(columns, dim=1)

    def total(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return the weighted mean over tasks of sums [tasks, columns] over the given counts [tasks, 3]: a scalar.

        With the counts of all ranks and micro-batches, the totals of all of them add up to the loss of the step.
        """
        energy = sums[:, 0] / counts[:, 0].clamp(min=1)
        forces = sums[:, 2] / counts[:, 1].clamp(min=1)
        by_task = self.settings.energy_weight * energy + self.settings.forces_weight * forces
        return (self.task_weights * by_task).sum() / self.task_weights.sum()


def run_objective(config: RunConfig, model: AtomisticModel) -> Objective:
    """Return the objective of a run, with the weights that its tasks are given."""
    weights = torch.tensor([task.weight for task in config.tasks], dtype=torch.float64, device=model.scales.device)
    return Objective(settings=config.loss, task_weights=weights, scales=model.scales)


def errors_by_task(sums: Tensor, names: list[str]) -> dict[str, dict[str, float | int | None]]:
    """Turn a table of sums over all ranks into mean absolute errors by task; None where a task has no such label."""
    report: dict[str, dict[str, float | int | None]] = {}
    for name, row in zip(names, sums.tolist(), strict=True):
        values = dict(zip(COLUMNS, row, strict=True))
        energies, components = values["energy_count"], values["forces_count"]
        report[name] = {
            "structures": int(values["structures"]),
            "energy_mae_mev_per_atom": 1000.0 * values["energy_error"] / energies if energies else None,
            "force_mae_mev_per_angstrom": 1000.0 * values["forces_error"] / components if components else None,
            "energy_loss": values["energy_loss"] / energies if energies else None,
            "forces_loss": values["forces_loss"] / components if components else None,
        }
    return report
