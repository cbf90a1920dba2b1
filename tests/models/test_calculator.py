"""The ASE calculator: reused neighbour lists, compiled steps, several tasks, warnings of extrapolation."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read
from structures import facts, rattled_crystal, rattled_molecule, small_model

from hydrazero.models import Potential
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders import ENCODERS
from hydrazero.models.inference.extrapolation import ExtrapolationWarning
from hydrazero.models.ops.compiled import CompilationError
from hydrazero.shards.errors import ModelFileError, StructureError


def steps_of(atoms: Atoms, steps: int = 12, seed: int = 0) -> list[Atoms]:
    """Return frames in which atoms move by more than the skin, and pairs leave and enter the cutoff."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(steps):
        atoms = atoms.copy()
        atoms.positions += rng.normal(scale=0.05, size=(len(atoms), 3))
        frames.append(atoms)
    return frames


@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_neighbours_with_a_skin_change_nothing(encoder):
    potential = Potential(small_model(encoder))
    for start in (rattled_molecule(), rattled_crystal()):
        with_skin, without = (potential.calculator("task1", skin=skin) for skin in (0.6, 0.0))
        frames = steps_of(start)
        for atoms in frames:
            fresh = potential.predict([atoms], tasks=["task1"])[0]
            for calculator in (with_skin, without):
                assert calculator.get_property("energy", atoms) == pytest.approx(fresh["energy"], abs=1e-9)
                np.testing.assert_allclose(calculator.get_forces(atoms), fresh["forces"], atol=1e-9)
                if atoms.pbc.all():
                    np.testing.assert_allclose(
                        calculator.get_stress(atoms), fresh["stress"].flat[[0, 4, 8, 5, 2, 1]], atol=1e-10
                    )
        assert without.neighbours.lists == len(frames) and 1 < with_skin.neighbours.lists < len(frames)


def test_a_list_ends_with_its_cell_elements_and_charge():
    potential = Potential(small_model())
    calculator = potential.calculator("task0", skin=1.0)
    atoms = rattled_crystal()
    changed = [atoms]
    for change in (
        lambda a: a.set_cell(a.cell[:] * 1.01),
        lambda a: a.set_pbc([True, True, False]),
        lambda a: a.symbols.__setitem__(0, "Cl"),
        lambda a: a.pop(),
        lambda a: a.info.__setitem__("charge", 1),
        lambda a: a.wrap(eps=0.5),
    ):
        later = changed[-1].copy()
        change(later)
        changed.append(later)
    for number, one in enumerate(changed, start=1):
        assert calculator.get_property("energy", one) == pytest.approx(
            potential.predict([one], tasks=["task0"])[0]["energy"], abs=1e-9
        )
        assert calculator.neighbours.lists == number


def test_a_calculation_that_fails_leaves_no_list_behind():
    potential = Potential(small_model())
    calculator = potential.calculator("task0")
    atoms = rattled_molecule("H2O")
    energy = calculator.get_property("energy", atoms)
    for bad, words in (
        (Atoms("Au2", [[0, 0, 0], [0, 0, 3.0]]), "the structure holds Au, which task 'task0' was not trained on"),
        (Atoms(), "no atoms"),
        (Atoms("H2", [[0, 0, 0], [0, 0, np.nan]]), "NaN"),
        (Atoms("H2", [[0, 0, 0], [0, 0, 0.01]]), "at the same place"),
    ):
        for _ in range(2):
            with pytest.raises(StructureError, match=words):
                calculator.get_property("energy", bad)
        assert calculator.get_property("energy", atoms) == energy


def compare_compiled_steps() -> None:
    potential = Potential(small_model(dtype=torch.float32, layers=1))
    eager, compiled = (potential.calculator("task1", skin=0.3, compile=compile) for compile in (False, True))
    for atoms in steps_of(rattled_molecule(), steps=8):
        assert compiled.get_property("energy", atoms) == pytest.approx(eager.get_property("energy", atoms), abs=1e-3)
        np.testing.assert_allclose(compiled.get_forces(atoms), eager.get_forces(atoms), atol=1e-4)
    assert compiled.neighbours.lists > 1 and len(compiled._model._graphs) == 1
    assert not potential.model.kernels


def test_steps_of_dynamics_may_be_traced_once(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    compare_compiled_steps()


@pytest.mark.compiler
def test_steps_of_dynamics_may_be_compiled():
    compare_compiled_steps()


def test_steps_that_cannot_be_compiled_run_as_they_are(monkeypatch):
    potential = Potential(small_model())
    calculator = potential.calculator("task0", compile=True)

    def fail(batch):
        raise CompilationError("no compiler")

    monkeypatch.setattr(calculator, "_model", fail)
    atoms = rattled_molecule("H2O")
    with pytest.warns(UserWarning, match=r"cannot be compiled \(no compiler\)"):
        energy = calculator.get_property("energy", atoms)
    assert energy == pytest.approx(potential.predict([atoms], tasks=["task0"])[0]["energy"], abs=1e-9)


def test_energies_of_several_tasks_and_how_far_they_are_apart(tmp_path):
    model = small_model(tasks=3)
    model.tasks[2] = facts("task2", elements=["H"])
    potential = Potential(model)
    atoms = rattled_molecule("H2O")
    atoms.calc = potential.calculator("task0", others=potential.tasks)
    with pytest.warns(ExtrapolationWarning, match="holds O, which task 'task2' was not trained on; the task is left"):
        energy = atoms.get_potential_energy()
    rows = {row["task"]: row["energy"] for row in potential.predict([atoms], tasks=["task0", "task1"])}
    assert atoms.calc.extras["task_energies"] == pytest.approx(rows, abs=1e-9) and energy == rows["task0"]
    references = 2 * -13.5 - 2040.0
    apart = np.std([rows[name] - references for name in rows], ddof=1)
    assert atoms.calc.extras["task_spread"] == pytest.approx(apart, abs=1e-9)
    atoms.write(tmp_path / "a.extxyz")
    assert read(tmp_path / "a.extxyz").get_potential_energy() == pytest.approx(energy)
    with pytest.raises(ModelFileError, match="did you mean 'task1'"):
        potential.calculator("task0", others=["task_1"])
    model.tasks[1] = replace(model.tasks[1], has_energy=False)
    with pytest.raises(ModelFileError, match="task 'task1' has no energies to compare"):
        potential.calculator("task0", others=["task1"])


def warned(calculator, atoms: Atoms) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calculator.get_property("energy", atoms)
    return [str(one.message) for one in caught if issubclass(one.category, ExtrapolationWarning)]


def test_distances_shorter_than_in_training_are_warned_of_once():
    model = small_model()
    model.tasks[0] = replace(model.tasks[0], closest={"H-O": 0.9, "H-H": 1.4, "H-C": 1.0}, closest_within=6.0)
    calculator = Potential(model).calculator("task0")
    water = molecule("H2O")
    assert warned(calculator, water) == []
    near = water.copy()
    near.set_distance(0, 1, 0.8, fix=0)
    (text,) = warned(calculator, near)
    assert text == (
        "atoms 0 and 1 of H2O (H-O) are 0.80 Å apart; these elements have a smallest distance of 0.90 Å in the "
        "training data of task 'task0'."
    )
    near.rattle(0.01)
    assert warned(calculator, near) == []
    (text,) = warned(calculator, molecule("CO2"))
    assert "of CO2 (C-O) are" in text and "these elements are never neighbours in the training data" in text
    assert warned(Potential(small_model()).calculator("task0"), near) == []  # the model has no statistics of distances


def test_an_ensemble_that_disagrees_more_than_before_is_warned_of():
    alone = small_model()
    model = AtomisticModel(alone.settings.model_copy(update={"ensemble": 3}), alone.tasks).double().eval()
    potential = Potential(model)
    atoms = rattled_molecule("H2O")
    per_atom = potential.predict([atoms], tasks=["task0"])[0]["energy_spread"] / 3
    for factor, count in ((1.1, 0), (0.9, 1)):
        model.tasks[0] = replace(model.tasks[0], largest_spread=factor * per_atom)
        found = warned(potential.calculator("task0"), atoms)
        assert len(found) == count and all("ensemble of task 'task0' disagrees by" in text for text in found)
