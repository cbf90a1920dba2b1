"""What an exported model is used for: conserved energy, relaxed cells, symmetric force and elastic constants."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.phonons import Phonons
from structures import small_model

from hydrazero.models import Potential, load_model, save_model
from hydrazero.models.atomistic import AtomisticModel

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from conserved_energy import System, draw, run_at_constant_energy


@pytest.fixture(scope="module")
def potential(tmp_path_factory: pytest.TempPathFactory) -> Potential:
    """An exported model; the repulsion keeps atoms apart that no training has told to stay so."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    alone = small_model()
    tasks = [replace(task, scale=10.0) for task in alone.tasks]  # a well some eV deep
    model = AtomisticModel(alone.settings.model_copy(update={"repulsion": "zbl"}), tasks).double().eval()
    save_model(model, path, dtype="float64")
    return load_model(path)


@pytest.fixture(scope="module")
def crystal(potential) -> Atoms:
    """Rock salt in the cell that it relaxes to, of cubic symmetry."""
    atoms = bulk("NaCl", "rocksalt", a=5.2)
    atoms.calc = potential.calculator("task0")
    assert BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-5, steps=300)
    return atoms


def test_dynamics_conserve_energy(potential, crystal, tmp_path):
    """A picosecond and less; `tests/bench/conserved_energy.py` runs ten of a trained model."""
    cell = Atoms(crystal.numbers, crystal.positions, cell=crystal.cell, pbc=True) * (2, 2, 2)
    systems = [
        System(label="a molecule", atoms=molecule("H2O"), task="task1", step=0.2),
        System(label="a crystal", atoms=cell, task="task0", step=1.0),
    ]
    runs = {}
    for system, picoseconds in zip(systems, (0.15, 0.15), strict=True):
        label = system.label
        runs[label] = found = run_at_constant_energy(potential, system, picoseconds, compile=False)
        assert np.isfinite(found.energies).all() and found.temperature > 100.0
        assert abs(found.drift) < 0.1 and np.ptp(found.energies) < 1.0, label
    draw(runs, tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_relaxes_until_it_has_no_stress(potential, crystal):
    np.testing.assert_allclose(crystal.get_stress(), 0.0, atol=1e-5)
    strained = crystal.copy()
    strained.set_cell(crystal.cell[:] @ (np.eye(3) + np.diag([0.02, -0.01, 0.01])), scale_atoms=True)
    strained.calc = potential.calculator("task0")
    before = strained.get_potential_energy()
    assert BFGS(FrechetCellFilter(strained), logfile=None).run(fmax=1e-4, steps=200)
    assert strained.get_potential_energy() < before
    assert strained.get_potential_energy() == pytest.approx(crystal.get_potential_energy(), abs=1e-4)
    assert strained.get_volume() == pytest.approx(crystal.get_volume(), rel=1e-3)


def test_elastic_constants_are_symmetric(potential, crystal):
    strain, columns = 1e-3, []
    for place in range(6):
        sides = []
        for sign in (1, -1):
            tensor = np.zeros((3, 3))
            row, column = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)][place]
            tensor[row, column] += 0.5 * sign * strain
            tensor[column, row] += 0.5 * sign * strain
            atoms = crystal.copy()
            atoms.set_cell(crystal.cell[:] @ (np.eye(3) + tensor), scale_atoms=True)
            atoms.calc = potential.calculator("task0")
            sides.append(atoms.get_stress())
        columns.append((sides[0] - sides[1]) / (2 * strain))
    constants = np.array(columns)
    assert np.isfinite(constants).all() and np.abs(constants).max() > 1e-3
    np.testing.assert_allclose(constants, constants.T, atol=2e-3 * np.abs(constants).max())
    assert constants[0, 0] == pytest.approx(constants[1, 1], rel=1e-3)  # the crystal is cubic
    assert constants[3, 3] == pytest.approx(constants[4, 4], rel=1e-3)


def test_force_constants_are_symmetric(potential, crystal, tmp_path):
    phonons = Phonons(crystal, potential.calculator("task0"), supercell=(3, 3, 3), delta=0.01, name=str(tmp_path / "p"))
    phonons.run()
    phonons.read(method="standard", acoustic=True, symmetrize=0)
    constants = phonons.get_force_constant()  # [cells, 3 N, 3 N], the first cell with each
    assert np.isfinite(constants).all()
    cells = phonons.compute_lattice_vectors().T
    opposite = [int(np.flatnonzero((((cells + cell) % 3) == 0).all(axis=1))[0]) for cell in cells]
    scale = np.abs(constants).max()
    np.testing.assert_allclose(constants, constants[opposite].transpose(0, 2, 1), atol=2e-3 * scale)
    frequencies = phonons.band_structure([[0.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    assert np.isfinite(frequencies).all()
    np.testing.assert_allclose(frequencies[0, :3], 0.0, atol=2e-3)  # eV: translations cost nothing
