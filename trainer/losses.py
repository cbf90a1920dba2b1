"""Per-task losses as sums and counts, so that they do not depend on how the work is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hydrazero.models.atomistic import AtomisticModel, Predictions
from hydrazero.models.task_facts import NONE
from hydrazero.shards.graph import GraphBatch
from hydrazero.trainer.config import LossSection, RunConfig

SMALLEST_SPREAD = 1e-6
"""In units of the task's scale, squared: keeps the likelihood of an ensemble whose members agree finite."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of one quantity in a batch: N structures or atoms with C components."""

    loss: Tensor
    """Of each item, summed over its components, with a graph: [N]; anything where there is no label."""
    absolute: Tensor
    """Sum of absolute errors over the components, in the quantity's unit, [N]."""
    labelled: Tensor
    """[N] bool."""
    components: int
    task: Tensor
    """[N] int64."""


def pointwise_loss(error: Tensor, settings: LossSection) -> Tensor:
    """Apply L1, L2 or Huber (slope 1 far out, as L1) to each error."""
    if settings.kind == "l1":
        return error.abs()
    if settings.kind == "l2":
        return error * error
    return functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=settings.huber_delta) / (
        settings.huber_delta
    )


def sum_by_task(values: Tensor, task: Tensor, tasks: int) -> Tensor:
    """Sum values [N] by their tasks [N]: [tasks] float64."""
    # A product with ones and zeros instead of a scatter: in a fixed order on every device.
    member = functional.one_hot(task, tasks).to(torch.float64)
    return values.to(torch.float64) @ member


def leave_out_unseen(batch: GraphBatch, model: AtomisticModel, known: Tensor) -> Tensor:
    """Mask every label of structures with an element that their task has not been trained on.

    `known` [tasks, 119] says which elements are; such a structure has no reference energy, so its error would be that
    of a total energy. Returns how many they are by task, [tasks] float64.
    """
    strange = ~known[batch.task[batch.structure], batch.numbers] & batch.atom_mask
    member = functional.one_hot(batch.structure, len(batch.task)).to(torch.float32)
    unseen = (strange.float() @ member > 0) & batch.structure_mask
    targets = model.targets.facts
    of_atoms = ["forces", *(f"target_{name}" for name, facts in targets.items() if facts.of == "atom")]
    of_structures = ["energy", "stress", *(f"target_{name}" for name in targets if f"target_{name}" not in of_atoms)]
    for name in of_structures:
        batch[f"{name}_mask"] = batch[f"{name}_mask"] & ~unseen
    for name in of_atoms:
        batch[f"{name}_mask"] = batch[f"{name}_mask"] & ~unseen[batch.structure]
    batch.structure_mask = batch.structure_mask & ~unseen
    return sum_by_task(unseen, batch.task, len(known))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a run: weights of tasks and of their parts.

    Its sums are a table [tasks, 3 * quantities + 1]: for each quantity the loss of scaled errors, how many components
    are labelled, and the sum of absolute errors; at the end structures.
    """

    settings: LossSection
    quantities: tuple[str, ...]
    """'energy' (per atom), 'forces', 'stress', 'spread' of an ensemble, and targets."""
    task_weights: Tensor
    """[tasks] float64."""
    scales: Tensor
    """Unit of the errors of each task's quantities, [tasks, quantities] float64: eV per atom, eV/Å, eV/Å³, ..."""
    of_atoms: frozenset[str] = frozenset({"forces"})
    """Quantities that atoms have, not structures."""

    @property
    def columns(self) -> int:
        """Columns of its sums."""
        return 3 * len(self.quantities) + 1

    def errors(self, predictions: Predictions, batch: GraphBatch) -> list[Errors]:
        """Return the errors of each quantity, in order."""
        return [self._errors(index, name, predictions, batch) for index, name in enumerate(self.quantities)]

    def _errors(self, index: int, name: str, predictions: Predictions, batch: GraphBatch) -> Errors:
        atom_task = batch.task[batch.structure]
        if name in ("energy", "spread"):
            # References are subtracted in float64; what is left is small enough for the model's precision.
            target = (batch.energy - predictions.reference).to(predictions.interaction.dtype)
            atoms = batch.n_atoms.clamp(min=1)
            error, mask, task = (predictions.interaction - target) / atoms, batch.energy_mask, batch.task
            if name == "spread":
                return self._spread(error, predictions.spread / atoms, batch, self.scales[:, index])
        elif name == "forces":
            error, mask, task = predictions.forces - batch.forces, batch.forces_mask, atom_task
        elif name == "stress":
            error, mask, task = predictions.stress - batch.stress, batch.stress_mask, batch.task
        else:
            error, mask = predictions.targets[name] - batch[f"target_{name}"], batch[f"target_{name}_mask"]
            task = atom_task if name in self.of_atoms else batch.task
        error = error.reshape(len(error), -1) * mask.unsqueeze(1)
        scale = self.scales[:, index].to(error.dtype)[task].unsqueeze(1)
        return Errors(
            loss=pointwise_loss(error / scale, self.settings).sum(1),
            absolute=error.detach().abs().sum(1),
            labelled=mask,
            components=error.shape[1],
            task=task,
        )

    def _spread(self, error: Tensor, spread: Tensor, batch: GraphBatch, scales: Tensor) -> Errors:
        """Return minus the log-likelihood of errors per atom [S] under a normal distribution as wide as the spread.

        As shallow ensembles are trained (Kellner, Ceriotti 2024, arXiv 2402.16621), for the spread alone.
        """
        scale, mask = scales.to(error.dtype)[batch.task], batch.energy_mask
        variance = (spread / scale) ** 2 + SMALLEST_SPREAD
        scaled = (error.detach() / scale) ** 2
        return Errors(
            loss=0.5 * (scaled / variance + torch.log(variance)) * mask,
            absolute=spread.detach() * mask,
            labelled=mask,
            components=1,
            task=batch.task,
        )

    def sums(self, predictions: Predictions, batch: GraphBatch) -> Tensor:
        """Return the table of sums of a batch, float64, with a graph through the losses."""
        tasks = len(self.task_weights)
        columns: list[Tensor] = []
        for errors in self.errors(predictions, batch):
            labels = sum_by_task(errors.labelled, errors.task, tasks) * errors.components
            columns += [
                sum_by_task(errors.loss, errors.task, tasks),
                labels,
                sum_by_task(errors.absolute, errors.task, tasks),
            ]
        columns.append(sum_by_task(batch.structure_mask, batch.task, tasks))
        return torch.stack(columns, dim=1)

    def counts(self, batch: GraphBatch) -> Tensor:
        """Return the labelled components of each quantity in a batch by task: [tasks, quantities] float64."""
        tasks, atom_task = len(self.task_weights), batch.task[batch.structure]
        columns = []
        for name in self.quantities:
            key = {"energy": "energy", "spread": "energy", "forces": "forces", "stress": "stress"}.get(
                name, f"target_{name}"
            )
            mask = batch[f"{key}_mask"]
            task = atom_task if name in self.of_atoms else batch.task
            components = 1 if name == "spread" else batch[key][0].numel()
            columns.append(components * sum_by_task(mask, task, tasks))
        return torch.stack(columns, dim=1)

    def total(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return the weighted mean over tasks of sums over the given counts [tasks, quantities]: a scalar.

        With the counts of all ranks and micro-batches, the totals of all of them add up to the loss of the step.
        """
        weights = torch.tensor([self.settings.weight(name) for name in self.quantities], dtype=torch.float64)
        means = sums[:, 0:-1:3] / counts.clamp(min=1)
        by_task = (means * weights.to(means.device)).sum(1)
        return (self.task_weights * by_task).sum() / self.task_weights.sum()


def run_objective(config: RunConfig, model: AtomisticModel) -> Objective:
    """Return the objective of a run, with the weights that its tasks are given."""
    quantities = ["energy", "forces"]
    if config.loss.stress_weight > 0 and any(task.stress != NONE for task in model.tasks):
        quantities.append("stress")
    if config.model.ensemble > 1:
        quantities.append("spread")
    quantities += list(model.targets.facts)
    device = model.scales.device
    weights = torch.tensor([task.weight for task in config.tasks], dtype=torch.float64, device=device)
    return Objective(
        settings=config.loss,
        quantities=tuple(quantities),
        task_weights=weights,
        scales=quantity_scales(model, quantities).to(device),
        of_atoms=frozenset({"forces", *(name for name, facts in model.targets.facts.items() if facts.of == "atom")}),
    )


def quantity_scales(model: AtomisticModel, quantities: list[str]) -> Tensor:
    """Return the unit of the errors of each task's quantities, [tasks, quantities] float64."""
    rows = []
    for task in model.tasks:
        own = {"energy": task.scale, "spread": task.scale, "forces": task.scale, "stress": task.stress_scale}
        own |= {name: facts.scale for name, facts in task.targets.items()}
        rows.append([own.get(name, 1.0) for name in quantities])
    return torch.tensor(rows, dtype=torch.float64)


def errors_by_task(sums: Tensor, names: list[str], objective: Objective) -> dict[str, dict[str, Any]]:
    """Turn a table of sums over all ranks into mean absolute errors by task; None where a task has no such label."""
    report: dict[str, dict[str, Any]] = {}
    for name, row in zip(names, sums.tolist(), strict=True):
        loss: dict[str, float | None] = {}
        mean: dict[str, float | None] = {}
        for index, quantity in enumerate(objective.quantities):
            total, count, absolute = row[3 * index : 3 * index + 3]
            loss[quantity] = total / count if count else None
            mean[quantity] = absolute / count if count else None
        energy, forces, stress = (mean.pop(key, None) for key in ("energy", "forces", "stress"))
        report[name] = {
            "structures": int(row[-1]),
            "energy_mae_mev_per_atom": _thousand(energy),
            "force_mae_mev_per_angstrom": _thousand(forces),
            "stress_mae_mev_per_angstrom3": _thousand(stress),
            "energy_spread_mev_per_atom": _thousand(mean.pop("spread", None)),
            "target_mae": mean,
            "energy_loss": loss["energy"],
            "forces_loss": loss["forces"],
        }
    return report


def _thousand(value: float | None) -> float | None:
    return None if value is None else 1000.0 * value
