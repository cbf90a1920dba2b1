"""ASE calculator for an exported model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from hydrazero.models.atomistic import Predictions
from hydrazero.models.inference.ase_structure import (
    all_conditions,
    check_all_conditions,
    stated_conditions,
    unread_condition,
)
from hydrazero.models.inference.extrapolation import Extrapolation, formula_of
from hydrazero.models.inference.own_modes import own_modes
from hydrazero.models.inference.potential import Potential, names_of
from hydrazero.models.inference.reused_neighbours import ReusedNeighbours
from hydrazero.models.inference.user_warnings import warn_user
from hydrazero.models.task_facts import NONE, TaskFacts
from hydrazero.shards.errors import ModelFileError, StructureError
from hydrazero.shards.graphs.graph import GraphBatch

ASE_TARGETS = {
    "charges": ("atom", "scalar", "e"),
    "dipole": ("structure", "vector", "eÅ"),
    "magmom": ("structure", "scalar", "µB"),
    "magmoms": ("atom", "scalar", "µB"),
}
"""Properties that ASE has a name for: what they belong to, their kind, and their unit."""


class HydrazeroCalculator(Calculator):
    """Energy, free energy (the same), forces and stress of one task, in ASE's units (eV, Å), and its targets.

    Charge and multiplicity are read from `atoms.info`. `results` holds what ASE has a name for, which may include the
    targets 'charges', 'dipole', 'magmom' and 'magmoms'; `extras` holds everything else of the same structure: the other
    targets by name; with an ensemble 'energy_spread' in eV; with other tasks 'task_energies' in eV by task and
    'task_spread', the standard deviation in eV of the energies above each task's own reference energies, since total
    energies of different methods cannot be compared. Both are empty after a calculation that failed.

    Neighbours are found within the cutoff plus a skin, and again after an atom has moved by half of the skin.
    Structures unlike the training data give a warning (`ExtrapolationWarning`), once for each kind and formula.
    Calculators in several threads may share a potential. Copies and pickles compile their steps again.
    """

    def __init__(
        self,
        potential: Potential,
        task: str,
        *,
        others: str | Sequence[str] = (),
        skin: float = 0.3,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        """Create a calculator; raise ModelFileError for an unknown task, or another task without energies to compare.

        `skin` is in Å. With `compile`, steps are compiled, which takes a minute at first and pays for dynamics of one
        system.
        """
        self.implemented_properties = _properties(potential.facts(task))
        self.extras: dict[str, Any] = {}
        super().__init__(**kwargs)
        self.potential, self.task = potential, task
        self.others = [name for name in names_of(others) if name != task]
        for name in [task, *self.others] if self.others else []:
            if not potential.facts(name).has_energy:
                raise ModelFileError(f"task '{name}' has no energies to compare; leave it out.")
        if not skin >= 0:
            raise ModelFileError(f"the skin is {skin:g} Å; it must be 0 or more.")
        self.neighbours = ReusedNeighbours(potential, task, skin, fixed_shape=compile)
        self._watch = Extrapolation(potential.facts(task), potential.cutoff)
        self._bounds = np.zeros(0)
        self._compile = compile
        self._model = potential.compiled() if compile else None
        self._seen_lists = 0
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out locks and compiled graphs, which cannot be copied."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_model")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile the steps of a copy anew."""
        vars(self).update(state)
        self._lock = threading.RLock()
        self._model = self.potential.compiled() if self._compile else None

    def reset(self) -> None:
        """Forget the last structure and its results."""
        super().reset()
        self.extras = {}

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what has changed since the last call; unlike in ASE, with charge and multiplicity."""
        changes: list[str] = super().check_state(atoms, tol=tol)
        if self.atoms is not None and stated_conditions(self.atoms) != stated_conditions(atoms):
            changes.append("info")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """Return a property as ASE does; threads that share the calculator wait for each other."""
        with self._lock:
            return super().get_property(name, atoms, allow_calculation)

    @own_modes()
    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Compute all properties; raise StructureError for elements that are not in the task's training data."""
        with self._lock:
            self.results, self.extras = {}, {}  # first of all: an error must not leave those of another structure
            super().calculate(atoms, properties, system_changes)
            if self.atoms is None:
                raise StructureError("no_atoms", "the calculator has no structure; give it one.")
            results, extras = self._results(self.atoms)
            formula = formula_of(self.neighbours.sample.structure.numbers)
            self._watch.look_at_untrained(formula, properties or ())
            self.results, self.extras = results, extras
            if "stress" not in results and properties and "stress" in properties:
                raise PropertyNotImplementedError("stress needs a periodic structure whose cell has three vectors.")

    def _results(self, atoms: Atoms) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the properties that ASE has a name for, and everything else."""
        facts = self.potential.facts(self.task)
        if facts.charge_spin:
            check_all_conditions(atoms)
        batch = self.neighbours.batch(atoms)
        if self.neighbours.lists != self._seen_lists:
            self._take_list()
        (row,) = self.potential.rows_of([self.neighbours.sample], self._predict(batch))
        stress = None if row["stress"] is None else full_3x3_to_voigt_6_stress(row["stress"])
        found = {"energy": row["energy"], "free_energy": row["energy"], "forces": row["forces"], "stress": stress}
        extras = {"energy_spread": row["energy_spread"]}
        for name, value in row["targets"].items():
            (found if _has_ase_form(facts, name) else extras)[name] = value
        self._look(atoms, row["energy_spread"])
        if self.others:
            extras |= self._compare_tasks(atoms, batch)
        results, extras = ({k: v for k, v in each.items() if v is not None} for each in (found, extras))
        return results, extras

    def _take_list(self) -> None:
        """Check a structure whose neighbours were just found."""
        sample = self.neighbours.sample
        if (reason := self.potential.why_not(sample.structure, self.task)) is not None:
            raise StructureError("unseen", f"the structure {reason}; leave it out or choose another task.")
        self._watch.look_at_composition(formula_of(sample.structure.numbers), sample.structure.numbers)
        self._bounds = self._watch.bounds(sample.structure.numbers, sample.pairs)
        self._seen_lists = self.neighbours.lists

    def _predict(self, batch: GraphBatch) -> Predictions:
        from hydrazero.models.ops.compiled import CompilationError

        if self._model is not None:
            try:
                return self._model(batch)
            except CompilationError as error:
                warn_user(f"steps cannot be compiled ({error}); they run without compilation.")
                self._model = None
        predictions: Predictions = self.potential.model(batch)
        return predictions

    def _look(self, atoms: Atoms, spread: float | None) -> None:
        sample = self.neighbours.sample
        formula = formula_of(sample.structure.numbers)
        unread = None if self._watch.facts.charge_spin else unread_condition(all_conditions(atoms))
        self._watch.look_at_conditions(formula, sample.structure, unread)
        if self._bounds.any():
            distances = self.neighbours.distances(atoms.positions)
            self._watch.look_at_distances(formula, sample.structure.numbers, sample.pairs, distances, self._bounds)
        if spread is not None:
            self._watch.look_at_spread(formula, spread / len(atoms))

    def _compare_tasks(self, atoms: Atoms, batch: GraphBatch) -> dict[str, Any]:
        """Return the energies of all tasks that support the structure, and their spread."""
        structure, model = self.neighbours.sample.structure, self.potential.model
        every = model.energies_of_all_tasks(batch)[0]
        energies, interactions = dict[str, float](), []
        for name in [self.task, *self.others]:
            if (reason := self.potential.why_not(structure, name)) is not None:
                self._watch.look_at_other(formula_of(structure.numbers), name, reason)
                continue
            index = self.potential.task_index(name)
            energies[name] = float(every[index])
            reference = model.reference_energy(batch, torch.full_like(batch.task, index))
            interactions.append(float(every[index] - reference[0]))
        spread = float(np.std(interactions, ddof=1)) if len(interactions) > 1 else None
        return {"task_energies": energies, "task_spread": spread}


def _properties(facts: TaskFacts) -> list[str]:
    found = {"energy": facts.has_energy, "free_energy": facts.has_energy}
    found |= {"forces": facts.forces != NONE, "stress": facts.stress != NONE}
    return [name for name, there in found.items() if there] + [n for n in facts.targets if _has_ase_form(facts, n)]


def _has_ase_form(facts: TaskFacts, name: str) -> bool:
    """Return whether a target is the quantity that ASE has under its name, also in shape and unit."""
    target = facts.targets[name]
    return ASE_TARGETS.get(name) == (target.of, target.kind, target.unit)
