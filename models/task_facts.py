"""What a model and its users need to know of its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.structure import MAX_ATOMIC_NUMBER

CONSERVATIVE, DIRECT, NONE = "conservative", "direct", "none"
"""Ways to forces and stress: minus the gradient of the energy, a head of their own, or not at all."""


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """A quantity beside energy, forces and stress, as one task has it."""

    of: str
    """'structure' or 'atom'."""
    kind: str
    """'scalar' or 'vector'."""
    unit: str = ""
    extensive: bool = False
    """Of a structure's scalar: a sum over its atoms, or a property of the whole as a band gap is."""
    mean: float = 0.0
    """Over the training labels (per atom if extensive); what the head gives is the difference from it."""
    scale: float = 1.0
    """Unit of the head's output: deviation of the training labels from the mean (per atom if extensive)."""

    @property
    def form(self) -> tuple[str, str, str, bool]:
        """What tasks that share the target must agree on."""
        return self.of, self.kind, self.unit, self.extensive


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What the model and its users need to know of a task."""

    name: str
    reference_energies: dict[str, float]
    """eV per atom of each element."""
    scale: float
    """Unit of the head's output: typical force in eV/Å, or residual energy per atom in eV for a task without forces."""
    elements: list[str]
    """Elements that the training split holds."""
    fidelity: str = ""
    """Method, as the manifest tells it."""
    has_energy: bool = True
    """Whether the training labels hold energies."""
    has_forces: bool = True
    """Whether the training labels hold forces."""
    forces: str = CONSERVATIVE
    """'conservative', 'direct' or 'none': how forces are predicted."""
    stress: str = CONSERVATIVE
    """'conservative', 'direct' or 'none': how stress is predicted."""
    stress_scale: float = 1.0
    """Typical stress of the training labels, eV/Å³."""
    charge_spin: bool = False
    """Whether the encoder is told total charge and spin."""
    multiplicity_known: bool = False
    """Whether every structure of the shards says its spin multiplicity."""
    targets: dict[str, TargetFacts] = field(default_factory=dict)
    """Other quantities that the training labels hold."""
    closest: dict[str, float] = field(default_factory=dict)
    """Two elements as 'Al-Cu', the lighter first -> smallest distance in the training split, Å."""
    closest_within: float = 0.0
    """Å: pairs of elements that `closest` lacks are nowhere closer than this; 0: not known."""
    largest_spread: float = 0.0
    """eV per atom: spread of the ensemble that 99% of the evaluated structures stay below; 0: not known."""


def reference_table(tasks: Sequence[TaskFacts]) -> Tensor:
    """Reference energies [tasks, 119] float64, eV; 0 for elements that a task does not know."""
    table = torch.zeros(len(tasks), MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    for row, task in enumerate(tasks):
        for symbol, energy in task.reference_energies.items():
            table[row, atomic_numbers[symbol]] = energy
    return table


def known_elements(tasks: Sequence[TaskFacts]) -> Tensor:
    """Whether the task's training split holds the element: [tasks, 119] bool."""
    table = torch.zeros(len(tasks), MAX_ATOMIC_NUMBER + 1, dtype=torch.bool)
    for row, task in enumerate(tasks):
        table[row, [atomic_numbers[symbol] for symbol in task.elements]] = True
    return table


def targets_of(tasks: Sequence[TaskFacts]) -> dict[str, TargetFacts]:
    """Return every target of any task; raises ConfigError if two tasks mean different things by one name."""
    found: dict[str, tuple[str, TargetFacts]] = {}
    for task in tasks:
        for name, facts in task.targets.items():
            owner, first = found.setdefault(name, (task.name, facts))
            if first.form != facts.form:
                raise ConfigError(
                    f"target '{name}' is {_said(first)} in task '{owner}' and {_said(facts)} in task '{task.name}'; "
                    "convert one of them again under another name."
                )
    return {name: facts for name, (_, facts) in found.items()}


def _said(facts: TargetFacts) -> str:
    size = " (extensive)" if facts.extensive else ""
    return f"a {facts.kind} of the {facts.of}{size} in '{facts.unit}'"


def task_facts_from(table: dict[str, Any]) -> TaskFacts:
    """Build facts from plain types; raises KeyError or TypeError for a field that is missing or unknown."""
    values = dict(table)
    values["targets"] = {name: TargetFacts(**facts) for name, facts in values.get("targets", {}).items()}
    return TaskFacts(**values)
