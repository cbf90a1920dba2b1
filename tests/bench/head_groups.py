"""Heads of two tasks on every rank, or each on the ranks of a group: the same data-parallel training in both.

Four ranks, two tasks. *Everywhere*: each rank has the stacked heads of both tasks and structures of both; all gradients
are summed over all ranks. *In groups*: two ranks have one task's head and structures, two the other's; a head's
gradients are summed over its two ranks, all others over all four. A step's structures are the same in both, and so is
its loss: each task's sum over its count on all ranks.
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
"""Ranks of a task, in groups."""
STRUCTURES = 8
"""Of a rank in a step; half of them of each task, or all of one."""
BATCHES = 2
"""Steps with structures of their own; then they come again."""
CUTOFF = 5.0
RATE = 5e-4
"""Of Adam."""
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
    """What is trained."""

    systems: tuple[System, System] = (CELLS, CELLS_AGAIN)
    """Structures and method of each task."""
    heads: float = 0.0
    """Parameters of both heads together over all others; 0: heads as the size 'small' has them."""


CASES = {
    "small": Case(),
    "large": Case(heads=3.0),
    "unequal": Case(systems=(MOLECULES, CELLS)),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What came of a step."""

    loss: float
    """Of all ranks."""
    sums: float
    """s that gradients took to be summed, from when all ranks had theirs."""
    sums_processor: float
    """s of this rank's processor in it."""


class Side:
    """A rank's part in data-parallel training with Adam."""

    def __init__(self, model: AtomisticModel, batches: Sequence[GraphBatch], group: dist.ProcessGroup | None) -> None:
        """Heads are summed over the ranks of `group` where there is one, which has one of the TASKS."""
        self.model, self.batches, self.group = model.train(), batches, group
        self.trained = ModelWithLoss(model, make_objective(model, LossSection(), [1.0] * len(model.tasks)))
        self.share = len(model.tasks) / TASKS
        """Of this model's tasks in the loss, which is a mean over all tasks."""
        named = dict(model.named_parameters())
        self.heads = {name: parameter for name, parameter in named.items() if name.startswith(STACKED)}
        self.shared = {name: parameter for name, parameter in named.items() if name not in self.heads}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def step(self, number: int) -> Step:
        """Do a step on the structures of this number."""
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
        """Return the bytes of weights, gradients and Adam's moments, after a step."""
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
    """Return both sides of a case, with the same weights at the start; called on all ranks."""
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
    """Return the size 'small', with heads as large as the case wants them."""
    sizes = size_settings("painn", "small")
    hidden = sizes.pop("head_features")
    encoder = EncoderSettings(cutoff=CUTOFF, **sizes)
    if case.heads:
        shared = parameters_of(AtomisticModel(ModelSettings(encoder=encoder, head_features=hidden), facts))[0]
        # A hidden feature has weights for all that the encoder gives, a bias, and a weight of its own for the energy.
        hidden = round(case.heads * shared / (TASKS * (encoder.features + 2)))
    return ModelSettings(encoder=encoder, head_features=hidden)


def parameters_of(model: AtomisticModel) -> tuple[int, int]:
    """Return the numbers of parameters that tasks share, and of those in heads."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    heads = sum(count for name, count in counts.items() if name.startswith(STACKED))
    return sum(counts.values()) - heads, heads


def by_step(structures: Sequence[Structure]) -> list[Sequence[Structure]]:
    """Return a task's structures of each step, for all ranks."""
    return [part(structures, step, BATCHES) for step in range(BATCHES)]


def part(structures: Sequence[Structure], number: int, parts: int) -> Sequence[Structure]:
    """Return one of so many equal parts."""
    size = len(structures) // parts
    return structures[number * size : (number + 1) * size]


def batch_of(of_tasks: Sequence[Sequence[Structure]]) -> GraphBatch:
    """Return a float32 batch of structures of tasks in order, of a shape that just holds them."""
    samples = [graph_sample(s, task, CUTOFF) for task, structures in enumerate(of_tasks) for s in structures]
    return collate(samples, shape_holding(samples), torch.float32)


def weight_differences(sides: dict[str, Side]) -> dict[str, float]:
    """Return the largest differences of this rank's weights between the sides: of 'shared' ones and of 'heads'."""
    everywhere, groups = sides[EVERYWHERE], sides[GROUPS]
    row = [task.name for task in everywhere.model.tasks].index(groups.model.tasks[0].name)
    shared = [everywhere.shared[name] - weight for name, weight in groups.shared.items()]
    heads = [everywhere.heads[name][row : row + 1] - weight for name, weight in groups.heads.items()]
    found = {"shared": shared, "heads": heads}
    return {name: max(float(each.abs().max()) for each in differences) for name, differences in found.items()}
