"""The model for torch-sim: torch-sim's own check, batches against single systems and ASE, relaxation and dynamics."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from structures import CUTOFF, facts, rattled_crystal, small_model

from hydrazero.models import Potential
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.shards.errors import ModelFileError, StructureError

ts = pytest.importorskip("torch_sim")
CPU = torch.device("cpu")


def potential_of(*elements: str, dtype: torch.dtype = torch.float64, **settings: object) -> Potential:
    torch.manual_seed(1)
    encoder = EncoderSettings(encoder="painn", features=16, layers=2, radial_functions=8, cutoff=CUTOFF)
    task = facts("metals", elements=list(elements), reference_energies=dict.fromkeys(elements, -3.0), **settings)
    return Potential(AtomisticModel(ModelSettings(encoder=encoder, head_features=8), [task]).to(dtype))


@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
@pytest.mark.parametrize("states", [torch.float32, torch.float64])
def test_torch_sim_takes_the_model(weights, states):
    from torch_sim.models.interface import validate_model_outputs

    model = potential_of("Si", "Fe", "Mg", dtype=weights).torch_sim("metals", dtype=states)
    validate_model_outputs(model, CPU, states)


def test_a_task_without_stress_says_so():
    from torch_sim.models.interface import validate_model_outputs

    model = potential_of("Si", "Fe", "Mg", stress="none").torch_sim("metals")
    assert not model.compute_stress
    with pytest.raises(NotImplementedError):
        model.compute_stress = True
    validate_model_outputs(model, CPU, torch.float64)
    with pytest.raises(ModelFileError, match="has no energies, which torch-sim needs"):
        potential_of("Si", has_energy=False, forces="direct", stress="none").torch_sim("metals")


def test_systems_of_a_batch_are_what_they_are_alone():
    potential = Potential(small_model())
    cells = [rattled_crystal(seed) for seed in range(3)]
    out = potential.torch_sim("task1")(ts.io.atoms_to_state(cells, CPU, torch.float64))
    first = 0
    for n, (cell, row) in enumerate(zip(cells, potential.predict(cells, tasks=["task1"]), strict=True)):
        assert float(out["energy"][n]) == pytest.approx(row["energy"], abs=1e-9)
        np.testing.assert_allclose(out["forces"][first : first + len(cell)].numpy(), row["forces"], atol=1e-10)
        np.testing.assert_allclose(out["stress"][n].numpy(), row["stress"], atol=1e-12)
        first += len(cell)


def test_molecules_without_a_cell():
    potential = Potential(small_model())
    water = molecule("H2O")
    out = potential.torch_sim("task0")(ts.io.atoms_to_state([water], CPU, torch.float64))
    assert float(out["energy"][0]) == pytest.approx(potential.predict([water], tasks=["task0"])[0]["energy"], abs=1e-9)
    assert not out["stress"].any()


def test_relaxations_of_a_batch_end_where_ase_ends():
    potential = Potential(small_model())
    cells = [rattled_crystal(seed) for seed in range(2)]
    model = potential.torch_sim("task0")
    start = model(ts.io.atoms_to_state(cells, CPU, torch.float64))["energy"]
    converged = ts.generate_force_convergence_fn(force_tol=0.02)
    state = ts.optimize(
        system=cells, model=model, optimizer=ts.frechet_cell_fire, convergence_fn=converged, max_steps=300
    )
    for n, atoms in enumerate(cells):
        relaxed = atoms.copy()
        relaxed.calc = potential.calculator("task0")
        FIRE(FrechetCellFilter(relaxed), logfile=None).run(fmax=0.02, steps=300)
        assert float(state.energy[n]) < float(start[n])
        assert float(state.energy[n]) == pytest.approx(relaxed.get_potential_energy(), abs=0.02 * len(atoms))


def test_a_system_that_the_task_cannot_take_is_named():
    model = potential_of("Cu").torch_sim("metals")
    state = ts.io.atoms_to_state([bulk("Cu", cubic=True), bulk("Au", cubic=True)], CPU, torch.float64)
    with pytest.raises(StructureError, match=r"system 1 holds Au, which task 'metals' was not trained on"):
        model(state)
    same = Atoms("Cu2", [[0, 0, 0], [0, 0, 0.001]], cell=np.eye(3) * 9, pbc=True)
    with pytest.raises(StructureError, match=re.escape("system 0: atoms 0 and 1 are at the same place.")):
        model(ts.io.atoms_to_state([same], CPU, torch.float64))
