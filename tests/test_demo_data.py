"""The demo's labels: true to their engines, with forces that are gradients, whatever the number of workers."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest

from hydrazero.trainer.demo_data import DEMO_TASKS, DemoError, make_demo_sources
from hydrazero.trainer.demo_structures import screening_structures

pytest.importorskip("tblite", reason="tblite is not installed: pip install 'hydrazero[demo]'")
pytest.importorskip("pyscf", reason="pyscf is not installed: pip install 'hydrazero[demo]'")

COUNTS = {"gfn2": 12, "gfn1": 4, "hf": 2, "emt": 12, "tersoff": 2}
TASKS = {task.name: task for task in DEMO_TASKS}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    return make_demo_sources(tmp_path_factory.mktemp("demo"), seed=3, workers=2, counts=COUNTS)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_labels_are_what_the_engine_says(files, name):
    frames = ase.io.read(files[name], ":")
    assert len(frames) == COUNTS[name]
    atoms = frames[-1]
    fresh = TASKS[name].label(atoms)
    assert atoms.get_potential_energy() == pytest.approx(fresh["energy"], abs=2e-5)
    np.testing.assert_allclose(atoms.get_forces(), fresh["forces"], atol=2e-4)
    if name in ("emt", "tersoff"):
        np.testing.assert_allclose(atoms.get_stress(), fresh["stress"], atol=1e-5)
    assert ("stress" in fresh) == bool(atoms.pbc.all())


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_forces_are_the_gradient(files, name):
    atoms = ase.io.read(files[name], "0")
    forces = TASKS[name].label(atoms)["forces"]
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[0, 1] += sign * 1e-3
        energies.append(TASKS[name].label(moved)["energy"])
    assert forces[0, 1] == pytest.approx(-(energies[0] - energies[1]) / 2e-3, abs=5e-3)


def test_workers_do_not_change_the_files(files, tmp_path):
    again = make_demo_sources(tmp_path, seed=3, workers=1, counts={"gfn2": 12, "emt": 12})
    for name, path in again.items():
        assert path.read_bytes() == files[name].read_bytes()


def test_an_engine_that_always_fails_is_an_error(monkeypatch):
    from hydrazero.trainer import demo_data

    def broken(atoms):
        raise RuntimeError("no convergence")

    task = demo_data.DemoTask(name="x", fidelity="X", structures=1, draw=TASKS["emt"].draw, label=broken)
    monkeypatch.setattr(demo_data, "DEMO_TASKS", (task,))
    with pytest.raises(DemoError, match=r"X failed on 20 structures in a row \(no convergence\)"):
        demo_data._label_chunk(0, 0, 1, seed=0)


def test_screening_structures_are_reproducible():
    first, second = list(screening_structures(9, seed=1)), list(screening_structures(9, seed=1))
    assert first == second and first != list(screening_structures(9, seed=2))
    assert [bool(a.pbc.all()) for a in first] == [n % 3 == 2 for n in range(9)]
