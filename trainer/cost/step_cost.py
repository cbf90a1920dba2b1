"""What a model is made of and what a training step of it costs, without training: parameters, operations, memory."""

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
"""Beginnings of the names of parameters that each task has its own of."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Numbers in a model's parameters."""

    encoder_groups: tuple[int, ...]
    """In what all tasks share, of each group of the optimizer."""
    head_groups: tuple[int, ...]
    """In what each task has its own of, all tasks together, of each group of the optimizer."""

    @property
    def encoder(self) -> int:
        """In what all tasks share."""
        return sum(self.encoder_groups)

    @property
    def heads(self) -> int:
        """In what each task has its own of."""
        return sum(self.head_groups)

    @property
    def groups(self) -> tuple[int, ...]:
        """In each group of the optimizer."""
        return tuple(map(sum, zip(self.encoder_groups, self.head_groups, strict=True)))

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.encoder + self.heads


def model_size(settings: ModelSettings, tasks: Sequence[TaskFacts]) -> ModelSize:
    """Count the parameters of a model that is not made."""
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
    """Of a training step with forces, as linear functions of the atoms and the slots of its batch."""

    flops_per_atom: float
    """Floating-point operations of matrix products."""
    flops_per_slot: float
    bytes_per_atom: float
    """Kept for the backward passes."""
    bytes_per_slot: float


@cache
def step_cost(settings: ModelSettings, tasks: int) -> StepCost:
    """Count on small batches; rows of several tasks go through heads in blocks of one, padding among them."""
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
    """Operations of a step's matrix products in the energy head per atom, 64 of each task."""
    head = ScalarHead(settings.head_size(tasks), settings.ensemble)
    task = torch.arange(tasks).repeat_interleave(64)
    scalars = torch.zeros(len(task), settings.encoder.features, requires_grad=True)
    with FlopCounterMode(display=False) as counter:  # which cannot follow a leaf into a module
        energy = head(scalars.clone(), TaskRows(task=task, count=tasks)).sum()
        (slope,) = torch.autograd.grad(energy, scalars, create_graph=True)
        (energy.square() + slope.square().sum()).backward()
    return counter.get_total_flops() / len(task)


def _flops(model: AtomisticModel, atoms: int, spare_rows: int) -> tuple[int, int, int]:
    """Operations of a step's matrix products, atoms and slots of the batch."""
    batch = probe_batch(atoms, spare_rows, model.settings.encoder.cutoff)
    with FlopCounterMode(display=False) as counter:
        predictions = model(batch)
        (predictions.interaction.square().sum() + predictions.forces.square().sum()).backward()
    return counter.get_total_flops(), len(batch.numbers), batch.slot_mask.numel()
