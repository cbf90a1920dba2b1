"""ASE calculator for an exported model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from hydrazero.models.atomistic import Predictions
from hydrazero.models.inference.extrapolation import Extrapolation
from hydrazero.models.inference.potential import CONDITIONS, Potential
from hydrazero.models.inference.reused_neighbours import ReusedNeighbours
from hydrazero.models.task_facts import NONE
from hydrazero.shards.errors import ModelFileError, StructureError
from hydrazero.shards.graphs.graph import GraphBatch

ASE_TARGETS = ("charges", "dipole", "magmom", "magmoms")
"""Targets under the names that ASE has for them."""


class HydrazeroCalculator(Calculator):
    """Energy, free energy (the same), forces and stress of one task, in ASE's units (eV, Å), and its targets.

    Charge and multiplicity are read from `atoms.info`. With an ensemble, `results` also contains 'energy_spread' in eV.
    With other tasks it contains 'task_energies' in eV by task, and 'task_spread', the standard deviation in eV of the
    energies above each task's own reference energies, since total energies of different methods cannot be compared.

    Neighbours are found within the cutoff plus a skin, and again after an atom has moved by half of the skin.
    Structures unlike the training data give a warning (`ExtrapolationWarning`), once for each kind and formula.
    """

    def __init__(
        self,
        potential: Potential,
        task: str,
        *,
        others: Sequence[str] = (),
        skin: float = 0.3,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        """Create a calculator; raise ModelFileError for an unknown task, or another task without energies to compare.

        `skin` is in Å. With `compile`, steps are compiled, which takes a minute at first and pays for dynamics of one
        system.
        """
        self.implemented_properties = _properties(potential, task)
        super().__init__(**kwargs)
        self.potential, self.task = potential, task
        self.others = [name for name in others if name != task]
        for name in [task, *self.others] if self.others else []:
            if not potential.facts(name).has_energy:
                raise ModelFileError(f"task '{name}' has no energies to compare; leave it out.")
        if skin < 0:
            raise ModelFileError(f"the skin is {skin:g} Å; it must be 0 or more.")
        self.neighbours = ReusedNeighbours(potential, task, skin, fixed_shape=compile)
        self._watch = Extrapolation(potential.facts(task), potential.cutoff)
        self._bounds = np.zeros(0)
        self._model = potential.compiled() if compile else None
        self._seen_lists = 0

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what has changed since the last call; unlike in ASE, with charge and multiplicity."""
        changes: list[str] = super().check_state(atoms, tol=tol)
        if self.atoms is not None and any(self.atoms.info.get(key) != atoms.info.get(key) for key in CONDITIONS):
            changes.append("info")
        return changes

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Compute all properties; raise StructureError for elements that are not in the task's training data."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        batch = self.neighbours.batch(self.atoms)
        if self.neighbours.lists != self._seen_lists:
            self._take_list()
        (row,) = self.potential.rows_of([self.neighbours.sample], self._predict(batch))
        found = {**row["targets"], "energy": row["energy"], "free_energy": row["energy"], "forces": row["forces"]}
        found["energy_spread"] = row["energy_spread"]
        self.results = {name: value for name, value in found.items() if value is not None}
        self._look(row["energy_spread"])
        self._watch.look_at_untrained(self.atoms.get_chemical_formula(), properties or ())
        if self.others:
            self._compare_tasks(batch)
        if row["stress"] is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(row["stress"])
        elif properties and "stress" in properties:
            raise PropertyNotImplementedError("stress needs a periodic structure whose cell has three vectors.")

    def _take_list(self) -> None:
        """Check a structure whose neighbours were just found."""
        sample = self.neighbours.sample
        if (reason := self.potential.why_not(sample.structure, self.task)) is not None:
            raise StructureError("unseen", f"the structure {reason}; leave it out or choose another task.")
        assert self.atoms is not None
        self._watch.look_at_composition(self.atoms.get_chemical_formula(), sample.structure.numbers)
        self._bounds = self._watch.bounds(sample.structure.numbers, sample.pairs)
        self._seen_lists = self.neighbours.lists

    def _predict(self, batch: GraphBatch) -> Predictions:
        from hydrazero.models.ops.compiled import CompilationError

        if self._model is not None:
            try:
                return self._model(batch)
            except CompilationError as error:
                warnings.warn(f"steps cannot be compiled ({error}); they run without compilation.", stacklevel=2)
                self._model = None
        predictions: Predictions = self.potential.model(batch)
        return predictions

    def _look(self, spread: float | None) -> None:
        sample, atoms = self.neighbours.sample, self.atoms
        assert atoms is not None
        formula = atoms.get_chemical_formula()
        if self._bounds.any():
            distances = self.neighbours.distances(atoms.positions)
            self._watch.look_at_distances(formula, sample.structure.numbers, sample.pairs, distances, self._bounds)
        if spread is not None:
            self._watch.look_at_spread(formula, spread / len(atoms))

    def _compare_tasks(self, batch: GraphBatch) -> None:
        """Add the energies of all tasks that support the structure, and their spread, to the results."""
        structure, model = self.neighbours.sample.structure, self.potential.model
        every = model.energies_of_all_tasks(batch)[0]
        energies, interactions = {}, []
        for name in [self.task, *self.others]:
            if (reason := self.potential.why_not(structure, name)) is not None:
                self._watch.look_at_other(self.atoms.get_chemical_formula(), name, f"it {reason}")
                continue
            index = self.potential.task_index(name)
            energies[name] = float(every[index])
            reference = model.reference_energy(batch, torch.full_like(batch.task, index))
            interactions.append(float(every[index] - reference[0]))
        self.results["task_energies"] = energies
        if len(interactions) > 1:
            self.results["task_spread"] = float(np.std(interactions, ddof=1))


def _properties(potential: Potential, task: str) -> list[str]:
    facts = potential.facts(task)
    found = {"energy": facts.has_energy, "free_energy": facts.has_energy}
    found |= {"forces": facts.forces != NONE, "stress": facts.stress != NONE}
    return [name for name, there in found.items() if there] + [name for name in ASE_TARGETS if name in facts.targets]
