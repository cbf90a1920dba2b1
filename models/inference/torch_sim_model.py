"""Model for torch-sim (package torch-sim-atomistic), which relaxes or moves many systems at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydrazero.models.inference.ase_structure import check_names, unread_condition
from hydrazero.models.inference.extrapolation import Extrapolation, formula_of
from hydrazero.models.inference.own_modes import own_modes
from hydrazero.models.inference.potential import Potential
from hydrazero.models.inference.short_distances import ShortDistances
from hydrazero.models.inference.user_warnings import warn_user
from hydrazero.models.task_facts import NONE
from hydrazero.shards.conditions import condition_named
from hydrazero.shards.errors import ConfigError, ModelFileError, StructureError
from hydrazero.shards.graphs.graph import GraphSample, collate, graph_sample, shape_holding
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.structure import (
    FloatArray,
    Structure,
    atomic_numbers_of,
    charge_of,
    check_structure,
    multiplicity_of,
)

REQUIREMENT = ("torch-sim-atomistic", "the torch-sim model", "torch-sim")
ModelInterface: Any = optional_module("torch_sim.models.interface", *REQUIREMENT).ModelInterface


class TorchSimModel(ModelInterface):  # type: ignore[misc]
    """One task of a model as a torch-sim model of S systems with A atoms in total.

    It gives energy [S] eV, forces [A, 3] eV/Å and stress [S, 3, 3] eV/Å³, with the sign that ASE uses. The stress of a
    system that is not periodic is zero. States and results have the type `dtype`; the model
    computes in the precision of its weights.

    A task that depends on charge and spin takes them from the state: `charge` and `spin` (the multiplicity 2S+1), of
    [S] numbers each. torch-sim's states of version 0.3 have neither, and drop those of ASE atoms.
    """

    def __init__(
        self,
        potential: Potential,
        task: str,
        *,
        dtype: torch.dtype = torch.float64,
        charge: int | None = None,
        multiplicity: int | None = None,
    ) -> None:
        """Create a model; `charge` and `multiplicity` are those of all systems, for states that do not have them.

        Raises ModelFileError for a task that the model does not have, or that has no energies, StructureError for a
        charge or multiplicity that is not valid.
        """
        super().__init__()
        facts = potential.facts(task)
        if not facts.has_energy:
            raise ModelFileError(f"task '{task}' has no energies, which torch-sim needs.")
        self.potential, self.task = potential, task
        self._device, self._dtype = potential.device, dtype
        self._charge = None if charge is None else charge_of(charge)
        self._multiplicity = None if multiplicity is None else multiplicity_of(multiplicity)
        self._watch = Extrapolation(facts, potential.cutoff)
        self._short = ShortDistances([facts], potential.cutoff)
        self._warned_of_cell = False
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

    @own_modes()
    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Return 'energy', 'forces' and 'stress' of a SimState, or of a dictionary with its fields.

        Raises StructureError, with the number of the system in its message, for a system that the task does not
        support, ConfigError for a state without the charges that the task depends on.
        """
        state = _plain(state)
        index, potential = self.potential.task_index(self.task), self.potential
        samples = [graph_sample(structure, index, potential.cutoff) for structure in self._structures(state)]
        self._look_at_distances(samples)
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
        numbers = np.split(atomic_numbers_of(state["atomic_numbers"].cpu().numpy()), ends)
        positions = np.split(state["positions"].detach().cpu().numpy().astype(np.float64), ends)
        # The cell vectors of torch-sim are columns.
        cells = state["cell"].detach().cpu().numpy().astype(np.float64).transpose(0, 2, 1)
        pbc = np.broadcast_to(np.asarray(torch.as_tensor(state["pbc"]).cpu()), 3).astype(bool)
        charges, multiplicities = self._conditions(state, systems)
        unread = self._unread(state)
        self._look_at_cells(cells, pbc)
        structures = []
        for n in range(systems):
            structure = Structure(
                numbers=numbers[n],
                positions=positions[n],
                cell=cells[n],
                pbc=pbc.copy(),
                charge=charges[n],
                multiplicity=multiplicities[n],
                source_id=f"system {n}",
            )
            self._check(structure, unread)
            structures.append(structure)
        return structures

    def _look_at_distances(self, samples: Sequence[GraphSample]) -> None:
        for pair in self._short.of_samples(samples):
            self._watch.look_at_pair(formula_of(samples[pair.structure].structure.numbers), pair)

    def _conditions(self, state: dict[str, Any], systems: int) -> tuple[list[int], list[int]]:
        """Return charge and multiplicity of each system."""
        charges, spins = state.get("charge"), state.get("spin")
        if charges is None and self._charge is None and self.potential.facts(self.task).charge_spin:
            raise ConfigError(
                f"task '{self.task}' depends on charge and spin, and the state has no charge; give the state `charge` "
                "and `spin`, or the model `charge` and `multiplicity` if they are those of all systems."
            )
        return (
            _per_system(charges, self._charge, systems, charge_of, "charge"),
            # A spin of 0 in a state means that it is unknown.
            _per_system(spins, self._multiplicity, systems, lambda value: multiplicity_of(value or None), "spin"),
        )

    def _unread(self, state: dict[str, Any]) -> str | None:
        """Return a charge or spin that a state has under a name that is not read; StructureError if it matters."""
        numbers = {name: _number(value) for name, value in state.items() if condition_named(name)}
        charge = "charge" if self._charge is None else None
        spin = "spin" if self._multiplicity is None else None
        if self.potential.facts(self.task).charge_spin:
            check_names(numbers, charge, spin)
        return unread_condition(numbers, charge, spin)

    def _look_at_cells(self, cells: FloatArray, pbc: NDArray[np.bool_]) -> None:
        """Warn once of cells that are not used; torch-sim 0.3 stores a slab as a structure that is not periodic."""
        if not pbc.any() and not self._warned_of_cell and (np.abs(np.linalg.det(cells)) > 1e-6).any():
            self._warned_of_cell = True
            warn_user(
                "a state has cells, but is not periodic, so that its systems are computed as isolated clusters; "
                "torch-sim drops the periodicity of structures that are periodic in one or two directions only."
            )

    def _check(self, structure: Structure, unread: str | None) -> None:
        try:
            check_structure(structure)
        except StructureError as error:
            raise StructureError(error.reason, f"{structure.source_id}: {error}.") from error
        if (reason := self.potential.why_not(structure, self.task)) is not None:
            raise StructureError("unseen", f"{structure.source_id} {reason}; leave it out or choose another task.")
        formula = formula_of(structure.numbers)
        self._watch.look_at_conditions(formula, structure, unread)
        self._watch.look_at_composition(formula, structure.numbers)
        self._watch.look_at_untrained(formula, ["forces"] * self.compute_forces + ["stress"] * self.compute_stress)


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


def _number(value: Any) -> Any:
    """Return the largest of the numbers of a tensor, by their size; other values as they are."""
    if not isinstance(value, Tensor) or not value.numel():
        return value
    flat = value.detach().reshape(-1)
    return flat[flat.abs().argmax()].item()


def _per_system(values: Any, default: int | None, systems: int, read: Callable[[Any], int], name: str) -> list[int]:
    """Return a number for each system, the default or 0 if the state does not have them."""
    if values is None:
        return [default or 0] * systems
    numbers = torch.as_tensor(values).detach().cpu().reshape(-1).tolist()
    if len(numbers) not in (1, systems):
        raise ConfigError(f"the state's {name} has {len(numbers)} numbers for {systems} systems; give one for each.")
    return [read(number) for number in (numbers * systems if len(numbers) == 1 else numbers)]
