"""Model for torch-sim (package torch-sim-atomistic), which relaxes or moves many systems at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydrazero.models.inference.potential import Potential
from hydrazero.models.task_facts import NONE
from hydrazero.shards.errors import ConfigError, ModelFileError, StructureError
from hydrazero.shards.graphs.graph import collate, graph_sample, shape_holding
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.structure import Structure, check_structure

REQUIREMENT = ("torch-sim-atomistic", "the torch-sim model", "torch-sim")
ModelInterface: Any = optional_module("torch_sim.models.interface", *REQUIREMENT).ModelInterface


class TorchSimModel(ModelInterface):  # type: ignore[misc]
    """One task of a model as a torch-sim model of S systems with A atoms in total.

    It gives energy [S] eV, forces [A, 3] eV/Å and stress [S, 3, 3] eV/Å³, with the sign that ASE uses. The stress of a
    system that is not periodic is zero. States and results have the type `dtype`; the model
    computes in the precision of its weights.
    """

    def __init__(self, potential: Potential, task: str, *, dtype: torch.dtype = torch.float64) -> None:
        """Raise ModelFileError for a task that the model does not have, or that has no energies."""
        super().__init__()
        facts = potential.facts(task)
        if not facts.has_energy:
            raise ModelFileError(f"task '{task}' has no energies, which torch-sim needs.")
        self.potential, self.task = potential, task
        self._device, self._dtype = potential.device, dtype
        self._supports = {"forces": facts.forces != NONE, "stress": facts.stress != NONE}
        self._compute_forces, self._compute_stress = self._supports["forces"], self._supports["stress"]

    @property
    def compute_forces(self) -> bool:
        """Whether the results contain forces."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, compute: bool) -> None:
        self._compute_forces = self._checked("forces", compute)

    @property
    def compute_stress(self) -> bool:
        """Whether the results contain the stress."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, compute: bool) -> None:
        self._compute_stress = self._checked("stress", compute)

    def _checked(self, name: str, compute: bool) -> bool:
        if compute and not self._supports[name]:
            # torch-sim expects this exception from a model without these results.
            raise NotImplementedError(f"task '{self.task}' has no {name}")
        return compute

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Return 'energy', 'forces' and 'stress' of a SimState, or of a dictionary with its fields.

        Raises StructureError, with the number of the system in its message, for a system that the task does not
        support.
        """
        state = _plain(state)
        index, potential = self.potential.task_index(self.task), self.potential
        samples = [graph_sample(structure, index, potential.cutoff) for structure in self._structures(state)]
        batch = collate(samples, shape_holding(samples), potential.model.dtype).to(potential.device)
        predictions = potential.model(batch)
        results = {"energy": predictions.energy}
        if self.compute_forces:
            results["forces"] = predictions.forces
        if self.compute_stress:
            results["stress"] = predictions.stress
        return {name: value.detach().to(self._dtype) for name, value in results.items()}

    def _structures(self, state: dict[str, Any]) -> list[Structure]:
        """Return the systems of a state, in which the atoms of each system are contiguous."""
        systems = state["cell"].shape[0]
        owner = state["system_idx"]
        ends = np.cumsum(torch.bincount(owner, minlength=systems).cpu().numpy())[:-1]
        numbers = np.split(state["atomic_numbers"].cpu().numpy().astype(np.uint8), ends)
        positions = np.split(state["positions"].detach().cpu().numpy().astype(np.float64), ends)
        # The cell vectors of torch-sim are columns.
        cells = state["cell"].detach().cpu().numpy().astype(np.float64).transpose(0, 2, 1)
        pbc = np.broadcast_to(np.asarray(torch.as_tensor(state["pbc"]).cpu()), 3).astype(bool)
        structures = []
        for n in range(systems):
            structure = Structure(
                numbers=numbers[n],
                positions=positions[n],
                cell=cells[n],
                pbc=pbc.copy(),
                charge=_integer(state.get("charge"), n),
                multiplicity=_integer(state.get("spin"), n),
                source_id=f"system {n}",
            )
            self._check(structure)
            structures.append(structure)
        return structures

    def _check(self, structure: Structure) -> None:
        try:
            check_structure(structure)
        except StructureError as error:
            raise StructureError(error.reason, f"{structure.source_id}: {error}.") from error
        if (reason := self.potential.why_not(structure, self.task)) is not None:
            raise StructureError("unseen", f"{structure.source_id} {reason}; leave it out or choose another task.")


def _plain(state: Any) -> dict[str, Any]:
    """Return the fields of a state; raise ConfigError if it lacks positions, cell, periodicity or atomic numbers."""
    fields = dict(state) if isinstance(state, dict) else vars(state)
    fields = {name.removeprefix("_"): value for name, value in fields.items()}
    fields |= fields.get("system_extras") or {}  # later versions keep charge and spin there
    missing = {"positions", "cell", "pbc", "atomic_numbers"} - fields.keys()
    if missing:
        raise ConfigError(f"the state lacks {', '.join(sorted(missing))}; give a torch_sim.SimState.")
    if fields.get("system_idx") is None:
        fields["system_idx"] = torch.zeros(len(fields["positions"]), dtype=torch.int64)
    if fields["cell"].dim() == 2:
        fields["cell"] = fields["cell"].unsqueeze(0)
    return fields


def _integer(values: Tensor | None, system: int) -> int:
    """Return a system's charge or spin multiplicity, 0 if the state does not have them."""
    return 0 if values is None else int(values.reshape(-1)[system])
