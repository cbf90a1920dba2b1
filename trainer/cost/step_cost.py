"""The size of a model and the cost of a training step, without training: parameters, operations, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.heads.heads import ScalarHead
from hydrazero.models.heads.task_linear import TaskRows
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.task_facts import TaskFacts
from hydrazero.trainer.cost.step_memory import StepMemory, probe_batch, probe_tasks
from hydrazero.trainer.engine.parameter_groups import parameter_groups

HEADS = ("energy_head.", "forces_head.", "stress_head.", "targets.")
"""Prefixes of the names of parameters that each task has for itself."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Numbers of parameters of a model."""

    encoder_groups: tuple[int, ...]
    """Parameters that all tasks share, by parameter group of the optimizer."""
    head_groups: tuple[int, ...]
    """Parameters of the heads of all tasks, by parameter group of the optimizer."""

    @property
    def encoder(self) -> int:
        """Number of parameters that all tasks share."""
        return sum(self.encoder_groups)

    @property
    def heads(self) -> int:
        """Number of parameters of the heads of all tasks."""
        return sum(self.head_groups)

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of parameters in each parameter group of the optimizer."""
        return tuple(map(sum, zip(self.encoder_groups, self.head_groups, strict=True)))

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return self.encoder + self.heads


def model_size(settings: ModelSettings, tasks: Sequence[TaskFacts]) -> ModelSize:
    """Count the parameters of a model without allocating them."""
    with torch.device("meta"):
        model = AtomisticModel(settings, tasks)
    of_heads = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(HEADS)}
    groups = [group["params"] for group in parameter_groups(model)]
    return ModelSize(
        encoder_groups=tuple(sum(p.numel() for p in group if id(p) not in of_heads) for group in groups),
        head_groups=tuple(sum(p.numel() for p in group if id(p) in of_heads) for group in groups),
    )


def planned_size(settings: ModelSettings, charge_spin: Sequence[bool]) -> ModelSize:
    """Count the parameters of a model whose shards need not exist, with heads for energies alone.

    `charge_spin` says for each task whether charge and spin are inputs.
    """
    tasks = probe_tasks(len(charge_spin))
    facts = [replace(task, charge_spin=has) for task, has in zip(tasks, charge_spin, strict=True)]
    return model_size(settings.model_copy(update={"attention_targets": ()}), facts)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of a training step with forces, as linear functions of the numbers of atoms and slots of its batch."""

    flops_per_atom: float
    """Floating-point operations of matrix products for each atom."""
    flops_per_slot: float
    """Floating-point operations of matrix products for each neighbour slot."""
    bytes_per_atom: float
    """Bytes for each atom that are kept for the backward passes."""
    bytes_per_slot: float
    """Bytes for each neighbour slot that are kept for the backward passes."""


@cache
def step_cost(settings: ModelSettings, tasks: int) -> StepCost:
    """Return the cost of a step, counted on small batches; heads process atoms in padded blocks of one task."""
    model = AtomisticModel(settings.model_copy(update={"attention_targets": ()}), probe_tasks(1)).train()
    small, wide, more = (_flops(model, atoms, spare) for atoms, spare in ((32, 0), (32, 64), (64, 0)))
    per_slot = (wide[0] - small[0]) / (wide[2] - small[2])
    of_one = (more[0] - small[0] - per_slot * (more[2] - small[2])) / (more[1] - small[1])
    memory = StepMemory(settings)
    return StepCost(
        flops_per_atom=of_one + _head_flops(settings, tasks) - _head_flops(settings, 1),
        flops_per_slot=per_slot,
        bytes_per_atom=memory.per_atom,
        bytes_per_slot=memory.per_slot,
    )


def _head_flops(settings: ModelSettings, tasks: int) -> float:
    """Return the operations of a step's matrix products in the energy head per atom, with 64 atoms of each task."""
    head = ScalarHead(settings.head_size(tasks), settings.ensemble)
    task = torch.arange(tasks).repeat_interleave(64)
    scalars = torch.zeros(len(task), settings.encoder.features, requires_grad=True)
    with FlopCounterMode(display=False) as counter:  # the counter cannot follow a leaf tensor into a module
        energy = head(scalars.clone(), TaskRows(task=task, count=tasks)).sum()
        (slope,) = torch.autograd.grad(energy, scalars, create_graph=True)
        (energy.square() + slope.square().sum()).backward()
    return counter.get_total_flops() / len(task)


def _flops(model: AtomisticModel, atoms: int, spare_rows: int) -> tuple[int, int, int]:
    """Return the operations of a step's matrix products, and the batch's numbers of atoms and slots."""
    batch = probe_batch(atoms, spare_rows, model.settings.encoder.cutoff)
    with FlopCounterMode(display=False) as counter:
        predictions = model(batch)
        (predictions.interaction.square().sum() + predictions.forces.square().sum()).backward()
    return counter.get_total_flops(), len(batch.numbers), batch.slot_mask.numel()
