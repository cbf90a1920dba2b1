"""ASE calculator of an exported model."""

from __future__ import annotations

from typing import Any

from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from hydrazero.models.potential import Potential


class HydrazeroCalculator(Calculator):
    """Energy, free energy (the same), forces and stress of one task, in ASE's units (eV, Å)."""

    def __init__(self, potential: Potential, task: str, **kwargs: Any) -> None:
        potential.task_index(task)
        self.implemented_properties = ["energy", "free_energy", "forces", "stress"]
        super().__init__(**kwargs)
        self.potential, self.task = potential, task

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Compute all properties at once; raises StructureError for elements that the task has not seen."""
        super().calculate(atoms, properties, system_changes)
        (row,) = self.potential.predict([self.atoms], tasks=[self.task])
        self.results = {"energy": row["energy"], "free_energy": row["energy"], "forces": row["forces"]}
        if row["stress"] is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(row["stress"])
        elif properties and "stress" in properties:
            raise PropertyNotImplementedError("stress needs a structure that is periodic in three directions.")
