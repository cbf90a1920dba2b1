"""Facts about the tasks that a model is built from and that its users need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from ase.data import atomic_numbers
from pydantic import AfterValidator, Field, TypeAdapter
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.settings_parser import STRICT, Element, Name, Pair, parse_typed
from hydrazero.shards.structure import MAX_ATOMIC_NUMBER, MAX_MAGNITUDE
from hydrazero.shards.targets import TargetName, internal_unit

PREDICTED = "_predicted"
"""End of the names of columns that hold predictions."""
CONSERVATIVE, DIRECT, NONE = "conservative", "direct", "none"
"""Ways to predict forces and stress: as the gradient of the energy, by a separate head, or not at all."""

UNTRAINED = {CONSERVATIVE: "derived from the energy, not trained", DIRECT: "not trained"}
"""What is said of forces and stress that are predicted in a way, but were never trained."""


Way = Annotated[str, Field(pattern=f"^({CONSERVATIVE}|{DIRECT}|{NONE})$")]
Number = Annotated[float, Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
Scale = Annotated[float, Field(gt=0, ge=1.0 / MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
"""The unit of a head's output, by which it is multiplied."""
Distance = Annotated[float, Field(ge=0, le=1e3)]
"""A distance in Å."""


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """A quantity of one task other than energy, forces and stress."""

    __pydantic_config__ = STRICT

    of: Annotated[str, Field(pattern="^(structure|atom)$")]
    """Whether it belongs to a 'structure' or to each 'atom'."""
    kind: Annotated[str, Field(pattern="^(scalar|vector)$")]
    """Kind of the quantity: 'scalar' or 'vector'."""
    unit: Annotated[str, AfterValidator(internal_unit)] = ""
    extensive: bool = False
    """Whether a scalar of a structure is a sum over its atoms, and not a property of the whole such as a band gap."""
    mean: Number = 0.0
    """Mean of the training labels (per atom if extensive), to which the output of the head is added."""
    scale: Scale = 1.0
    """Unit of the head's output: deviation of the training labels from the mean (per atom if extensive)."""

    @property
    def form(self) -> tuple[str, str, str, bool]:
        """The properties that all tasks with this target must have in common."""
        return self.of, self.kind, self.unit, self.extensive


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """Facts about one task that the model and its users need."""

    __pydantic_config__ = STRICT

    name: Name
    reference_energies: dict[Element, Number]
    """Reference energy of an atom of each element in eV."""
    scale: Scale
    """Unit of the head's output: typical force in eV/Å, or residual energy per atom in eV for a task without forces."""
    elements: Annotated[list[Element], Field(min_length=1)]
    """Elements in the training split."""
    fidelity: str = ""
    """Method of the labels, as given in the manifest."""
    has_energy: bool = True
    """Whether the training labels include energies."""
    has_forces: bool = True
    """Whether the training labels include forces, which were trained."""
    has_stress: bool = True
    """Whether the training labels include stress, which was trained."""
    forces: Way = CONSERVATIVE
    """Way in which forces are predicted: 'conservative', 'direct' or 'none'."""
    stress: Way = CONSERVATIVE
    """Way in which stress is predicted: 'conservative', 'direct' or 'none'."""
    stress_scale: Scale = 1.0
    """Typical stress of the training labels in eV/Å³."""
    charge_spin: bool = False
    """Whether total charge and spin are inputs of the encoder."""
    multiplicity_known: bool = False
    """Whether the spin multiplicity of every structure in the shards is known."""
    targets: dict[TargetName, TargetFacts] = field(default_factory=dict)
    """Other quantities among the training labels, by name."""
    closest: dict[Pair, Distance] = field(default_factory=dict)
    """Smallest distance of two elements in the training split in Å, by a key such as 'Al-Cu', the lighter one first."""
    closest_within: Distance = 0.0
    """Distance in Å that pairs of elements missing in `closest` are always above; 0 if it is unknown."""
    undetermined_sums: list[Annotated[dict[Element, Number], Field(min_length=1)]] = field(default_factory=list)
    """Combinations of elements, element -> coefficient, whose reference energies the training compositions leave open;
    see the manifest."""
    largest_spread: Annotated[Number, Field(ge=0)] = 0.0
    """Spread of the ensemble in eV per atom that 99% of the evaluated structures do not exceed; 0 if it is unknown."""

    @property
    def untrained(self) -> list[str]:
        """Those of 'forces' and 'stress' that are predicted, but were never trained."""
        found = {"forces": (self.forces, self.has_forces), "stress": (self.stress, self.has_stress)}
        return [name for name, (way, trained) in found.items() if way != NONE and not trained]


def reference_table(tasks: Sequence[TaskFacts]) -> Tensor:
    """Return reference energies in eV, [tasks, 119] float64; 0 for elements that a task does not know."""
    table = torch.zeros(len(tasks), MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    for row, task in enumerate(tasks):
        for symbol, energy in task.reference_energies.items():
            table[row, atomic_numbers[symbol]] = energy
    return table


def known_elements(tasks: Sequence[TaskFacts]) -> Tensor:
    """Return whether the training split of each task contains each element, [tasks, 119] bool."""
    table = torch.zeros(len(tasks), MAX_ATOMIC_NUMBER + 1, dtype=torch.bool)
    for row, task in enumerate(tasks):
        table[row, [atomic_numbers[symbol] for symbol in task.elements]] = True
    return table


def targets_of(tasks: Sequence[TaskFacts]) -> dict[str, TargetFacts]:
    """Return the targets of all tasks.

    Raises ConfigError if one name stands for different quantities in two tasks, or for the predictions of another one.
    """
    found: dict[str, tuple[str, TargetFacts]] = {}
    for task in tasks:
        for name, facts in task.targets.items():
            if name + PREDICTED in task.targets:
                raise ConfigError(
                    f"task '{task.name}' has the targets '{name}' and '{name}{PREDICTED}', and the second is the name "
                    "of the first one's predictions; leave one out (targets of the task), or convert it under another "
                    "name."
                )
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


_TASK = TypeAdapter(TaskFacts)


def task_facts_from(table: Any) -> TaskFacts:
    """Build facts from plain types of any origin; raise ConfigError for a field that is missing, unknown or wrong."""
    where = "the model's description: tasks"
    if isinstance(table, dict) and "has_stress" not in table and "stress_scale" in table:
        # Descriptions of earlier versions have the scale 1 where there were no labels.
        table = {**table, "has_stress": table["stress_scale"] != 1.0}
    try:
        text = json.dumps(table)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read ({error}).") from error
    task = parse_typed(_TASK, text, where, ConfigError)
    if task.has_energy and (lost := set(task.elements) - set(task.reference_energies)):
        raise ConfigError(f"{where}: '{task.name}' lacks the reference energy of {', '.join(sorted(lost))}.")
    return task
