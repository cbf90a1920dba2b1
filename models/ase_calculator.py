"""ASE calculator of an exported model."""

from __future__ import annotations

from typing import Any

from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from hydrazero.models.potential import CONDITIONS, Potential
from hydrazero.models.task_facts import NONE

ASE_TARGETS = ("charges", "dipole", "magmom", "magmoms")
"""Targets that ASE knows by these names."""


class HydrazeroCalculator(Calculator):
    """Energy, free energy (the same), forces and stress of one task, in ASE's units (eV, Å), and its targets.

    Charge and multiplicity are those of `atoms.info`. With an ensemble, `results` hold 'energy_spread' in eV too.
    """

    def __init__(self, potential: Potential, task: str, **kwargs: Any) -> None:
        potential.task_index(task)
        facts = potential.facts(task)
        found = {"energy": facts.has_energy, "free_energy": facts.has_energy}
        found |= {"forces": facts.forces != NONE, "stress": facts.stress != NONE}
        self.implemented_properties = [name for name, there in found.items() if there]
        self.implemented_properties += [name for name in ASE_TARGETS if name in facts.targets]
        super().__init__(**kwargs)
        self.potential, self.task = potential, task

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what has changed since the last call: charge and multiplicity too, which ASE does not look at."""
        changes: list[str] = super().check_state(atoms, tol=tol)
        if self.atoms is not None and any(self.atoms.info.get(key) != atoms.info.get(key) for key in CONDITIONS):
            changes.append("info")
        return changes

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Compute all properties at once; raises StructureError for elements that the task has not seen."""
        super().calculate(atoms, properties, system_changes)
        (row,) = self.potential.predict([self.atoms], tasks=[self.task])
        found = {**row["targets"], "energy": row["energy"], "free_energy": row["energy"], "forces": row["forces"]}
        if row["energy_spread"] is not None:
            found["energy_spread"] = row["energy_spread"]
        self.results = {name: value for name, value in found.items() if value is not None}
        if row["stress"] is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(row["stress"])
        elif properties and "stress" in properties:
            raise PropertyNotImplementedError("stress needs a structure that is periodic in three directions.")
