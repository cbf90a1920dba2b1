"""Data-parallel training with the heads of two tasks on every rank, or each head on a group of ranks.

There are four ranks and two tasks. *Everywhere*: each rank has the stacked heads of both tasks and structures of both;
all gradients are summed over all ranks. *In groups*: two ranks have the head and structures of one task, two those of
the other; the gradients of a head are summed over its two ranks, all others over all four. Both use the same structures
in a step and the same loss, in which each task's sum is divided by its count on all ranks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from torch import Tensor, nn

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "ranks", "support"))
from structures import rattled_molecule, to_structure

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders import size_settings
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.inference.model_file import STACKED, with_tasks
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.ops.compiled import use_kernels
from hydrazero.models.task_facts import NONE, TaskFacts
from hydrazero.shards.graphs.graph import GraphBatch, collate, graph_sample, shape_holding
from hydrazero.shards.structure import Structure
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.ranks import distributed

RANKS, TASKS = 4, 2
GROUP = RANKS // TASKS
"""Number of ranks per task with heads in groups."""
STRUCTURES = 8
"""Number of structures per rank and step; half belong to each task, or all to one."""
BATCHES = 2
"""Number of steps with different structures, which are then repeated."""
CUTOFF = 5.0
RATE = 5e-4
"""Learning rate of Adam."""
EVERYWHERE, GROUPS = "everywhere", "groups"


def molecule(seed: int) -> Atoms:
    """Return a rattled ethanol, 9 atoms."""
    return rattled_molecule(seed=seed)


def cell(seed: int) -> Atoms:
    """Return a rattled cell of 48 Cu atoms."""
    atoms = bulk("Cu", cubic=True) * (3, 2, 2)
    atoms.rattle(0.1, seed=seed)
    return atoms


def lennard_jones() -> Calculator:
    """Return pair forces that hold copper together; energies go to zero smoothly at 5 Å."""
    return LennardJones(sigma=2.3, epsilon=0.4, rc=5.0, ro=4.0, smooth=True)


System = tuple[Callable[[int], Atoms], Callable[[], Calculator]]
MOLECULES: System = (molecule, EMT)
CELLS: System = (cell, EMT)
CELLS_AGAIN: System = (cell, lennard_jones)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The systems and the size of the heads in a comparison."""

    systems: tuple[System, System] = (CELLS, CELLS_AGAIN)
    """Structures and calculator of each task."""
    heads: float = 0.0
    """Number of parameters of both heads divided by that of all others; 0 keeps the heads of the size 'small'."""


CASES = {
    "small": Case(),
    "large": Case(heads=3.0),
    "unequal": Case(systems=(MOLECULES, CELLS)),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Results of a step."""

    loss: float
    """Loss over all ranks."""
    sums: float
    """Seconds of the sum of gradients, from the moment when all ranks have theirs."""
    sums_processor: float
    """Processor seconds of this rank in the sum."""


class Side:
    """The part of one rank in data-parallel training with Adam."""

    def __init__(self, model: AtomisticModel, batches: Sequence[GraphBatch], group: dist.ProcessGroup | None) -> None:
        """Sum the gradients of heads over `group`, the ranks of one of the TASKS, or over all ranks if it is None."""
        self.model, self.batches, self.group = model.train(), batches, group
        self.trained = ModelWithLoss(model, make_objective(model, LossSection(), [1.0] * len(model.tasks)))
        self.share = len(model.tasks) / TASKS
        """Share of this model's tasks in the loss, which is a mean over all tasks."""
        named = dict(model.named_parameters())
        self.heads = {name: parameter for name, parameter in named.items() if name.startswith(STACKED)}
        self.shared = {name: parameter for name, parameter in named.items() if name not in self.heads}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def step(self, number: int) -> Step:
        """Train on the structures of a numbered step; return its results."""
        batch = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad()
        counts = self.trained.objective.counts(batch)
        dist.all_reduce(counts, group=self.group)
        loss = self.trained(batch, counts)[0] * self.share
        loss.backward()
        distributed.wait_for_all()
        began, processor = time.perf_counter(), time.process_time()
        self._sum_gradients()
        sums, processor = time.perf_counter() - began, time.process_time() - processor
        total = distributed.sum_over_ranks(loss.detach())
        self.optimizer.step()
        return Step(loss=float(total), sums=sums, sums_processor=processor)

    def _sum_gradients(self) -> None:
        if self.group is None:
            sum_gradients([*self.shared.values(), *self.heads.values()], None)
        else:
            sum_gradients(list(self.shared.values()), None)
            sum_gradients(list(self.heads.values()), self.group)

    def state_bytes(self) -> int:
        """Return the number of bytes of weights, gradients and Adam's moments, after a step."""
        weights = list(self.model.parameters())
        moments = [self.optimizer.state[weight][key] for weight in weights for key in ("exp_avg", "exp_avg_sq")]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*weights, *gradients_of(weights), *moments])


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients; every parameter must have one, so that messages are the same on all ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(gradients) < len(parameters):
        raise RuntimeError("a parameter has no gradient")
    return gradients


def sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sum gradients over the ranks of a group, None for all, in one message."""
    gradients = gradients_of(parameters)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, summed in zip(gradients, parts, strict=True):
        gradient.copy_(summed.view_as(gradient))


def make_sides(case: Case) -> dict[str, Side]:
    """Return both sides of a case with the same initial weights; all ranks must call this."""
    made = [labelled(f"task{number}", *system) for number, system in enumerate(case.systems)]
    facts, structures = [of_task[0] for of_task in made], [of_task[1] for of_task in made]
    torch.manual_seed(0)
    model = AtomisticModel(model_settings(case, facts), facts)
    rank = distributed.rank()
    own, member = divmod(rank, GROUP)
    groups = [dist.new_group(list(range(first, first + GROUP))) for first in range(0, RANKS, GROUP)]
    mixed = [[part(of_step, rank, RANKS) for of_step in by_step(of_task)] for of_task in structures]
    alone = [part(of_step, member, GROUP) for of_step in by_step(structures[own])]
    one_head = with_tasks(model, [facts[own].name])
    sides = {
        EVERYWHERE: Side(model, [batch_of(of_tasks) for of_tasks in zip(*mixed, strict=True)], None),
        GROUPS: Side(one_head, [batch_of([of_task]) for of_task in alone], groups[own]),
    }
    for side in sides.values():
        if reason := use_kernels(side.model):
            raise SystemExit(f"the kernels are missing: {reason}")
    return sides


def labelled(
    name: str, make: Callable[[int], Atoms], method: Callable[[], Calculator]
) -> tuple[TaskFacts, list[Structure]]:
    """Return a task and its structures for BATCHES steps."""
    structures = []
    for seed in range(BATCHES * GROUP * STRUCTURES):
        atoms = make(seed)
        atoms.calc = method()
        structures.append(to_structure(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces()))
    elements = sorted(set(atoms.get_chemical_symbols()))
    reference = float(np.mean([s.energy / len(s.numbers) for s in structures]))
    facts = TaskFacts(
        name=name,
        reference_energies=dict.fromkeys(elements, reference),
        scale=float(np.sqrt(np.mean([np.mean(s.forces**2) for s in structures]))),
        elements=elements,
        stress=NONE,
    )
    return facts, structures


def model_settings(case: Case, facts: Sequence[TaskFacts]) -> ModelSettings:
    """Return the settings of the size 'small' with heads of the size that the case requires."""
    sizes = size_settings("painn", "small")
    hidden = sizes.pop("head_features")
    encoder = EncoderSettings(cutoff=CUTOFF, **sizes)
    if case.heads:
        shared = parameters_of(AtomisticModel(ModelSettings(encoder=encoder, head_features=hidden), facts))[0]
        # A hidden feature has a weight for each feature of the encoder, a bias, and a weight for the energy.
        hidden = round(case.heads * shared / (TASKS * (encoder.features + 2)))
    return ModelSettings(encoder=encoder, head_features=hidden)


def parameters_of(model: AtomisticModel) -> tuple[int, int]:
    """Return the numbers of parameters that tasks share, and of parameters in heads."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    heads = sum(count for name, count in counts.items() if name.startswith(STACKED))
    return sum(counts.values()) - heads, heads


def by_step(structures: Sequence[Structure]) -> list[Sequence[Structure]]:
    """Return the structures of a task by step, for all ranks together."""
    return [part(structures, step, BATCHES) for step in range(BATCHES)]


def part(structures: Sequence[Structure], number: int, parts: int) -> Sequence[Structure]:
    """Return the part of a number when structures are divided into equal parts."""
    size = len(structures) // parts
    return structures[number * size : (number + 1) * size]


def batch_of(of_tasks: Sequence[Sequence[Structure]]) -> GraphBatch:
    """Return the smallest float32 batch that holds the structures of the tasks in order."""
    samples = [graph_sample(s, task, CUTOFF) for task, structures in enumerate(of_tasks) for s in structures]
    return collate(samples, shape_holding(samples), torch.float32)


def weight_differences(sides: dict[str, Side]) -> dict[str, float]:
    """Return the largest differences between this rank's weights on both sides, of 'shared' weights and 'heads'."""
    everywhere, groups = sides[EVERYWHERE], sides[GROUPS]
    row = [task.name for task in everywhere.model.tasks].index(groups.model.tasks[0].name)
    shared = [everywhere.shared[name] - weight for name, weight in groups.shared.items()]
    heads = [everywhere.heads[name][row : row + 1] - weight for name, weight in groups.heads.items()]
    found = {"shared": shared, "heads": heads}
    return {name: max(float(each.abs().max()) for each in differences) for name, differences in found.items()}
