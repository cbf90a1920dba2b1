"""Interface of torch-sim (package torch-sim-atomistic): relaxations and dynamics of many systems at once."""

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

WANTED_FOR = ("torch-sim-atomistic", "the torch-sim model", "torch-sim")
ModelInterface: Any = optional_module("torch_sim.models.interface", *WANTED_FOR).ModelInterface


class TorchSimModel(ModelInterface):  # type: ignore[misc]
    """One task of a model for torch-sim: energy eV [S], forces eV/Å [A, 3] and stress eV/Å³ [S, 3, 3] (ASE's sign).

    The stress of a system that is not periodic in three directions is zero. States and results are of `dtype`; the
    model computes in the precision of its weights.
    """

    def __init__(self, potential: Potential, task: str, *, dtype: torch.dtype = torch.float64) -> None:
        """Raise ModelFileError for a task that is not there, or gives neither energies nor forces."""
        super().__init__()
        facts = potential.facts(task)
        if not facts.has_energy:
            raise ModelFileError(f"task '{task}' has no energies, which torch-sim needs.")
        self.potential, self.task = potential, task
        self._device, self._dtype = potential.device, dtype
        self._may = {"forces": facts.forces != NONE, "stress": facts.stress != NONE}
        self._compute_forces, self._compute_stress = self._may["forces"], self._may["stress"]

    @property
    def compute_forces(self) -> bool:
        """Whether forces are given."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, wanted: bool) -> None:
        self._compute_forces = self._checked("forces", wanted)

    @property
    def compute_stress(self) -> bool:
        """Whether stress is given."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, wanted: bool) -> None:
        self._compute_stress = self._checked("stress", wanted)

    def _checked(self, name: str, wanted: bool) -> bool:
        if wanted and not self._may[name]:
            # What torch-sim expects of a model that cannot.
            raise NotImplementedError(f"task '{self.task}' has no {name}")
        return wanted

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Return 'energy', 'forces' and 'stress' of a SimState, or of a dictionary of what it holds.

        Raises StructureError, which names the system, for one that the task cannot take.
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
        """Return the systems of a state, whose atoms follow each other."""
        systems = state["cell"].shape[0]
        owner = state["system_idx"]
        ends = np.cumsum(torch.bincount(owner, minlength=systems).cpu().numpy())[:-1]
        numbers = np.split(state["atomic_numbers"].cpu().numpy().astype(np.uint8), ends)
        positions = np.split(state["positions"].detach().cpu().numpy().astype(np.float64), ends)
        cells = state["cell"].detach().cpu().numpy().astype(np.float64).transpose(0, 2, 1)  # torch-sim's are columns
        pbc = np.broadcast_to(np.asarray(torch.as_tensor(state["pbc"]).cpu()), 3).astype(bool)
        found = []
        for n in range(systems):
            structure = Structure(
                numbers=numbers[n],
                positions=positions[n],
                cell=cells[n],
                pbc=pbc.copy(),
                charge=_whole(state.get("charge"), n),
                multiplicity=_whole(state.get("spin"), n),
                source_id=f"system {n}",
            )
            self._check(structure)
            found.append(structure)
        return found

    def _check(self, structure: Structure) -> None:
        try:
            check_structure(structure)
        except StructureError as error:
            raise StructureError(error.reason, f"{structure.source_id}: {error}.") from error
        if (reason := self.potential.why_not(structure, self.task)) is not None:
            raise StructureError("unseen", f"{structure.source_id} {reason}; leave it out or choose another task.")


def _plain(state: Any) -> dict[str, Any]:
    """Return a state's fields; raises ConfigError for one without atomic numbers."""
    fields = dict(state) if isinstance(state, dict) else vars(state)
    fields = {name.removeprefix("_"): value for name, value in fields.items()}
    fields |= fields.get("system_extras") or {}  # where later versions keep charge and spin
    missing = {"positions", "cell", "pbc", "atomic_numbers"} - fields.keys()
    if missing:
        raise ConfigError(f"the state lacks {', '.join(sorted(missing))}; give a torch_sim.SimState.")
    if fields.get("system_idx") is None:
        fields["system_idx"] = torch.zeros(len(fields["positions"]), dtype=torch.int64)
    if fields["cell"].dim() == 2:
        fields["cell"] = fields["cell"].unsqueeze(0)
    return fields


def _whole(values: Tensor | None, system: int) -> int:
    """Return a system's charge or spin multiplicity; 0 in states that do not hold it."""
    return 0 if values is None else int(values.reshape(-1)[system])
