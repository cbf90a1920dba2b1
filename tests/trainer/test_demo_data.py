"""The demo's labels: true to their engines, with forces that are gradients, whatever the number of workers."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace

import ase.io
import numpy as np
import pytest
from ase.build import bulk

from hydrazero.trainer.demo import labels as demo_data
from hydrazero.trainer.demo.labels import DEMO_TASKS, LARGEST_FORCE, DemoError, label_tersoff, make_demo_sources
from hydrazero.trainer.demo.structures import MOST_ATOMS, SMALL_MOLECULES, molecule_names, screening_structures

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
    assert atoms.get_potential_energy() == pytest.approx(fresh["energy"], abs=5e-6)
    np.testing.assert_allclose(atoms.get_forces(), fresh["forces"], atol=1e-5)
    if name in ("emt", "tersoff"):
        np.testing.assert_allclose(atoms.get_stress(), fresh["stress"], atol=1e-7)
    assert ("stress" in fresh) == bool(atoms.pbc.all()) == (name in ("emt", "tersoff"))
    assert all(frame.info["system"] for frame in frames)
    assert all(np.abs(frame.get_forces()).max() < LARGEST_FORCE for frame in frames)


@pytest.mark.parametrize(("name", "method"), [("gfn2", "GFN2-xTB"), ("gfn1", "GFN1-xTB")])
def test_xtb_labels_are_those_of_the_engines_own_ase_calculator(files, name, method):
    from tblite.ase import TBLite

    atoms = ase.io.read(files[name], "0")
    again = atoms.copy()
    again.calc = TBLite(method=method, verbosity=0)
    assert TASKS[name].fidelity == method
    assert atoms.get_potential_energy() == pytest.approx(again.get_potential_energy(), abs=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), again.get_forces(), atol=1e-3)


def test_hartree_fock_labels_are_those_of_the_engine_in_atomic_units(files):
    from pyscf import gto, scf

    atoms = ase.io.read(files["hf"], "0")
    positions = (atoms.positions / 0.529177210).tolist()
    geometry = list(zip(atoms.get_chemical_symbols(), positions, strict=True))
    mean_field = scf.RHF(gto.M(atom=geometry, basis="sto-3g", unit="Bohr", verbose=0)).run()
    assert atoms.get_potential_energy() == pytest.approx(mean_field.e_tot * 27.2113862, abs=1e-3)
    gradient = mean_field.nuc_grad_method().kernel()
    np.testing.assert_allclose(atoms.get_forces(), -gradient * 27.2113862 / 0.529177210, atol=1e-3)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_forces_are_the_gradient(files, name):
    atoms = ase.io.read(files[name], "0")
    forces = TASKS[name].label(atoms)["forces"]
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[0, 1] += sign * 1e-3
        energies.append(TASKS[name].label(moved)["energy"])
    assert forces[0, 1] == pytest.approx(-(energies[0] - energies[1]) / 2e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["emt", "tersoff"])
@pytest.mark.parametrize(("voigt", "row", "column"), [(0, 0, 0), (2, 2, 2), (3, 1, 2), (5, 0, 1)])
def test_stress_is_the_derivative_by_strain(files, name, voigt, row, column):
    atoms = ase.io.read(files[name], "0")
    energies = []
    for sign in (1, -1):
        strain = np.eye(3)
        strain[row, column] += sign * 5e-5
        strain[column, row] += sign * 5e-5  # the diagonal gets both halves, 1e-4 in all
        moved = atoms.copy()
        moved.set_cell(atoms.cell[:] @ strain, scale_atoms=True)
        energies.append(TASKS[name].label(moved)["energy"])
    numeric = (energies[0] - energies[1]) / 2e-4 / atoms.get_volume()
    assert atoms.get_stress()[voigt] == pytest.approx(numeric, abs=1e-6)


def test_tersoff_silicon_has_the_published_cohesive_energy_and_lattice_constant():
    cells = [bulk("Si", "diamond", a=a, cubic=True) for a in (5.412, 5.432, 5.452)]
    low, middle, high = (label_tersoff(cell)["energy"] / 8 for cell in cells)
    assert middle == pytest.approx(-4.63, abs=5e-3)
    assert middle < min(low, high)


def test_workers_do_not_change_the_files(files, tmp_path):
    again = make_demo_sources(tmp_path, seed=3, workers=1, counts=COUNTS)
    assert sorted(again) == sorted(COUNTS)
    for name, path in again.items():
        assert path.read_bytes() == files[name].read_bytes()


def test_the_summary_counts_what_was_replaced(files):
    summary = json.loads((files["emt"].parent / demo_data.SUMMARY_NAME).read_text())
    assert {name: facts["structures"] for name, facts in summary["tasks"].items()} == COUNTS
    assert summary["seed"] == 3 and summary["tasks"]["gfn2"]["fidelity"] == "GFN2-xTB"


def flaky_task(failures, largest=1.0):
    """A task whose label fails `failures` times and then gives forces of `largest`."""
    calls = Counter()

    def label(atoms):
        calls["label"] += 1
        if calls["label"] <= failures:
            raise RuntimeError("no convergence")
        return {"energy": 0.0, "forces": np.full((len(atoms), 3), -largest)}

    return replace(TASKS["emt"], fidelity="X", label=label)


def test_failures_of_an_engine_are_counted_and_replaced(monkeypatch):
    monkeypatch.setattr(demo_data, "DEMO_TASKS", (flaky_task(failures=3),))
    frames, redrawn = demo_data._label_chunk(0, 0, 4, seed=0)
    assert len(frames) == 4 and redrawn == {"engine_failed": 3}


@pytest.mark.parametrize(
    ("task", "reason"), [(flaky_task(99), "no convergence"), (flaky_task(0, 20.0), "a force component of 15.0 eV/Å")]
)
def test_an_engine_that_always_fails_is_an_error(monkeypatch, task, reason):
    monkeypatch.setattr(demo_data, "DEMO_TASKS", (task,))
    with pytest.raises(DemoError, match=rf"X gave no usable labels for 20 structures in a row \(last: {reason}"):
        demo_data._label_chunk(0, 0, 1, seed=0)


def test_a_missing_engine_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "tblite").mkdir()
    (tmp_path / "tblite" / "__init__.py").write_text("raise ImportError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # the worker processes get it too
    with pytest.raises(DemoError, match=r"needs tblite.*pip install 'hydrazero\[demo\]'"):
        make_demo_sources(tmp_path / "out", workers=1, counts={"gfn2": 1})
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_task_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(DemoError, match=r"no task 'gfn3' \(known: emt, gfn1, gfn2"):
        make_demo_sources(tmp_path / "out", counts={"gfn3": 1})
    assert not (tmp_path / "out").exists()


def test_workers_get_one_thread_and_the_environment_comes_back(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    before, seen = dict(os.environ), []

    def progress(name, count):
        seen.append((name, count, {os.environ.get(variable) for variable in demo_data.THREAD_VARIABLES}))

    make_demo_sources(tmp_path, workers=1, counts={"emt": 12}, progress=progress)
    assert seen == [("emt", 10, {"1"}), ("emt", 2, {"1"})]
    assert dict(os.environ) == before


def test_every_name_is_a_molecule_of_the_collections():
    names = molecule_names()
    assert set(SMALL_MOLECULES) < set(names)
    assert len(names) == len(set(names)) > 100


def test_screening_structures_are_reproducible():
    first, second = list(screening_structures(9, seed=1)), list(screening_structures(9, seed=1))
    assert first == second and first != list(screening_structures(9, seed=2))
    assert [bool(a.pbc.all()) for a in first] == [n % 3 == 2 for n in range(9)]
    assert all(len(a) <= (32 if a.pbc.all() else MOST_ATOMS) for a in first)
