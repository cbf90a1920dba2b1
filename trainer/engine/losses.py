"""Losses of the tasks as sums and counts, which do not depend on how the work is divided among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hydrazero.models.atomistic import AtomisticModel, Predictions
from hydrazero.models.task_facts import NONE, TaskFacts
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.config.sections import LossSection

SMALLEST_SPREAD = 1e-6
"""Added to variances, in squared units of the task's scale: keeps the likelihood finite if all members agree."""
SMALLEST_LENGTH = 1e-12
"""Added to squared lengths, in squared units of the task's scale: keeps the gradient finite for an error of zero."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of one quantity in a batch, for N structures or atoms."""

    loss: Tensor
    """Loss summed over the components, with gradients, [N]; 0 where there is no label."""
    absolute: Tensor
    """Sum of absolute errors over the components, in the quantity's unit, [N]."""
    labelled: Tensor
    """Whether there is a label, [N] bool."""
    components: int
    """Number of components of the quantity."""
    task: Tensor
    """Index of the task, [N] int64."""


def pointwise_loss(error: Tensor, settings: LossSection) -> Tensor:
    """Return the L1, L2 or Huber loss of each error; the slope of Huber's is 1 for large errors, as that of L1."""
    if settings.kind == "l1":
        return error.abs()
    if settings.kind == "l2":
        return error * error
    return functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=settings.huber_delta) / (
        settings.huber_delta
    )


def sum_by_task(values: Tensor, task: Tensor, tasks: int) -> Tensor:
    """Return the sums of values [N] by their tasks [N], as [tasks] float64."""
    # A product with ones and zeros instead of a scatter, so that the order of the sum is fixed on every device.
    member = functional.one_hot(task, tasks).to(torch.float64)
    return values.to(torch.float64) @ member


def leave_out_unseen(batch: GraphBatch, model: AtomisticModel, known: Tensor) -> Tensor:
    """Mask all labels of structures that contain an element on which their task has not been trained.

    `known` [tasks, 119] is true for the elements of each task. Without a reference energy, the error of such a
    structure would be that of a total energy. Return the number of such structures by task, [tasks] float64.
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
    """The loss of a run: a weighted mean over tasks and quantities.

    Its sums are a table [tasks, 3 * quantities + 1]. Each quantity has three columns: the loss of scaled errors, the
    number of labelled components, and the sum of absolute errors. The last column counts structures.
    """

    settings: LossSection
    quantities: tuple[str, ...]
    """Names of the quantities: 'energy' (per atom), 'forces', 'stress', 'spread' of an ensemble, and targets."""
    of_atoms: frozenset[str]
    """Names of the quantities that each atom has, rather than each structure."""
    task_weights: Tensor
    """Weights of the tasks, [tasks] float64."""
    weights: Tensor
    """Weights of the quantities at the present step, [quantities] float64."""
    final_weights: Tensor
    """Weights of the quantities at the end of the run, [quantities] float64."""
    scales: Tensor
    """Unit of the errors of each task's quantities, [tasks, quantities] float64: eV per atom, eV/Å, eV/Å³, ..."""
    predicted: Tensor
    """Whether a task predicts a quantity, [tasks, quantities] bool; labels of the other quantities are ignored."""

    @property
    def columns(self) -> int:
        """Number of columns of the sums."""
        return 3 * len(self.quantities) + 1

    def errors(self, predictions: Predictions, batch: GraphBatch) -> list[Errors]:
        """Return the errors of each quantity, in order."""
        return [self._errors(index, name, predictions, batch) for index, name in enumerate(self.quantities)]

    def _errors(self, index: int, name: str, predictions: Predictions, batch: GraphBatch) -> Errors:
        atom_task = batch.task[batch.structure]
        if name in ("energy", "spread"):
            # References are subtracted in float64; the difference is small enough for the model's precision.
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
        mask = mask & self.predicted[:, index][task]
        error = error.reshape(len(error), -1) * mask.unsqueeze(1)
        scale = self.scales[:, index].to(error.dtype)[task].unsqueeze(1)
        scaled = error / scale
        if name == "forces" and self.settings.force_errors == "norm":
            scaled = (scaled * scaled).sum(1, keepdim=True).add(SMALLEST_LENGTH).sqrt()
        return Errors(
            loss=pointwise_loss(scaled, self.settings).sum(1) * mask,
            absolute=error.detach().abs().sum(1),
            labelled=mask,
            components=error.shape[1],
            task=task,
        )

    def _spread(self, error: Tensor, spread: Tensor, batch: GraphBatch, scales: Tensor) -> Errors:
        """Return minus the log-likelihood of errors per atom [S] under a normal distribution as wide as the spread.

        This is the loss of shallow ensembles (Kellner, Ceriotti 2024, arXiv 2402.16621), here for the spread alone. It
        is multiplied by the spread without its gradient (Seitzer et al. 2022, arXiv 2203.09168, beta = 1/2): otherwise
        gradients grow as the inverse of a small spread, and clipping removes those of all other quantities.
        """
        scale, mask = scales.to(error.dtype)[batch.task], batch.energy_mask
        variance = (spread / scale) ** 2 + SMALLEST_SPREAD
        scaled = (error.detach() / scale) ** 2
        return Errors(
            loss=0.5 * (scaled / variance + torch.log(variance)) * variance.detach().sqrt() * mask,
            absolute=spread.detach() * mask,
            labelled=mask,
            components=1,
            task=batch.task,
        )

    def sums(self, predictions: Predictions, batch: GraphBatch) -> Tensor:
        """Return the table of sums of a batch, [tasks, columns] float64, with gradients of the losses."""
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
        """Return the numbers of labelled components in a batch, [tasks, quantities] float64."""
        tasks, atom_task = len(self.task_weights), batch.task[batch.structure]
        columns = []
        for index, name in enumerate(self.quantities):
            key = {"energy": "energy", "spread": "energy", "forces": "forces", "stress": "stress"}.get(
                name, f"target_{name}"
            )
            mask = batch[f"{key}_mask"]
            task = atom_task if name in self.of_atoms else batch.task
            components = 1 if name == "spread" else batch[key][0].numel()
            columns.append(components * sum_by_task(mask, task, tasks) * self.predicted[:, index])
        return torch.stack(columns, dim=1)

    def total(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return the weighted mean over tasks of sums divided by counts [tasks, quantities]: a scalar.

        With counts of all ranks and micro-batches together, the totals of all of them add up to the loss of the step.
        """
        return (self.task_weights * self.by_task(sums, counts)).sum() / self.task_weights.sum()

    def score(self, sums: Tensor, own_weights: Tensor) -> float:
        """Return the mean loss over tasks that have labels, weighted by weights [tasks]; NaN if none has.

        It can be compared between evaluations: it does not depend on the present balance of the tasks, and the
        quantities have their final weights.
        """
        counts = sums[:, 1:-1:3]
        weights = own_weights * (counts.sum(1) > 0)
        losses = (_means(sums, counts) * self.final_weights).sum(1)
        return float((weights * losses).sum() / weights.sum())

    def by_task(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return the loss of each task, weighted over its quantities, from sums and counts: [tasks] float64."""
        return (_means(sums, counts) * self.weights).sum(1)

    def weigh(self, share: float) -> None:
        """Set the weights of the quantities to those after a share (0 to 1) of the run's steps."""
        first = self.weights.new_tensor([self.settings.weight(name) for name in self.quantities])
        self.weights.copy_(torch.lerp(first, self.final_weights, self.settings.change(share)))


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    """Return the mean loss of each task's quantities, [tasks, quantities] float64."""
    return sums[:, 0:-1:3] / counts.clamp(min=1)


def make_objective(model: AtomisticModel, settings: LossSection, task_weights: Sequence[float]) -> Objective:
    """Return the objective for the quantities that a model predicts."""
    of_tasks = [_scales_of(task) for task in model.tasks]
    quantities = ["energy", "forces"]
    if (settings.weight("stress") or settings.final_weight("stress")) and any("stress" in task for task in of_tasks):
        quantities.append("stress")
    if model.settings.ensemble > 1:
        quantities.append("spread")
    targets = model.targets.facts
    quantities += list(targets)
    scales = [[task.get(name, 1.0) for name in quantities] for task in of_tasks]
    predicted = [[name in task for name in quantities] for task in of_tasks]
    device = model.scales.device

    def table(values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    return Objective(
        settings=settings,
        quantities=tuple(quantities),
        of_atoms=frozenset({"forces", *(name for name, facts in targets.items() if facts.of == "atom")}),
        task_weights=table(task_weights),
        weights=table([settings.weight(name) for name in quantities]),
        final_weights=table([settings.final_weight(name) for name in quantities]),
        scales=table(scales),
        predicted=torch.tensor(predicted, device=device),
    )


def _scales_of(task: TaskFacts) -> dict[str, float]:
    """Return the unit of the errors of each quantity that a task predicts."""
    scales = {"energy": task.scale, "spread": task.scale}
    if task.forces != NONE:
        scales["forces"] = task.scale
    if task.stress != NONE:
        scales["stress"] = task.stress_scale
    return scales | {name: facts.scale for name, facts in task.targets.items()}
