"""What the calculator leaves behind: results under ASE's names and types, and none of another structure."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import ase.db
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError, all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from structures import CUTOFF, facts, rattled_crystal, rattled_molecule, small_model

from hydrazero.models import Potential, load_model, save_model
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.inference.extrapolation import ExtrapolationWarning
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.task_facts import TargetFacts
from hydrazero.shards.errors import StructureError

OF_ATOMS, OF_ALL = {"of": "atom", "kind": "scalar"}, {"of": "structure", "kind": "scalar"}
NAMED = {
    "charges": TargetFacts(**OF_ATOMS, unit="e"),
    "magmoms": TargetFacts(**OF_ATOMS, unit="µB"),
    "magmom": TargetFacts(**OF_ALL, unit="µB"),
    "dipole": TargetFacts(of="structure", kind="vector", unit="eÅ"),
}
OTHER = {
    "gap": TargetFacts(**OF_ALL, unit="eV"),
    "spins": TargetFacts(of="atom", kind="vector", unit="µB"),
    "stresses": TargetFacts(**OF_ATOMS, unit="eV"),
    "polarization": TargetFacts(of="structure", kind="vector", unit="eÅ"),
}


def potential_with(dtype: torch.dtype = torch.float32, **settings: object) -> Potential:
    """Return an ensemble of two tasks, the first of which has targets."""
    torch.manual_seed(5)
    encoder = EncoderSettings(encoder="painn", features=16, layers=1, radial_functions=8, cutoff=CUTOFF)
    tasks = [facts("task0", targets={**NAMED, **OTHER}, **settings), facts("task1")]
    model = AtomisticModel(ModelSettings(encoder=encoder, head_features=8, ensemble=2), tasks)
    return Potential(model.to(dtype))


@pytest.mark.parametrize("start", [rattled_molecule, rattled_crystal])
def test_results_have_names_shapes_and_types_of_ase(start):
    atoms = start()
    atoms.calc = potential_with().calculator("task0", others="task1")
    names = [name for name in atoms.calc.implemented_properties if name != "stress" or atoms.pbc.all()]
    found = atoms.get_properties(names)
    assert set(atoms.calc.results) == set(names) <= set(all_properties) and set(NAMED) <= set(names)
    n = len(atoms)
    shapes = {"forces": (n, 3), "stress": (6,), "charges": (n,), "magmoms": (n,), "dipole": (3,)}
    for name in names:
        value = atoms.calc.results[name]
        if name in shapes:
            assert value.dtype == np.float64 and value.shape == shapes[name]
        else:
            assert type(value) is float
        assert np.array_equal(found[name], value)
    extras = atoms.calc.extras
    assert set(extras) == {*OTHER, "energy_spread", "task_energies", "task_spread"}
    assert {type(extras[name]) for name in ("gap", "energy_spread", "task_spread")} == {float}
    assert {type(value) for value in extras["task_energies"].values()} == {float}
    assert extras["spins"].shape == (n, 3) and extras["spins"].dtype == np.float64
    assert atoms.get_dipole_moment().shape == (3,) and type(atoms.get_magnetic_moment()) is float


def test_a_target_in_another_unit_or_shape_is_no_property_of_ase():
    model = potential_with().model
    changed = {"charges": replace(NAMED["charges"], kind="vector"), "dipole": replace(NAMED["dipole"], unit="")}
    tasks = [facts("task0", targets=changed)]
    calculator = Potential(AtomisticModel(model.settings, tasks)).calculator("task0")
    water = rattled_molecule("H2O")
    calculator.get_potential_energy(water)
    assert set(calculator.results) == {"energy", "free_energy", "forces"}
    assert calculator.extras["charges"].shape == (3, 3) and calculator.extras["dipole"].shape == (3,)
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property("dipole", water)


def test_databases_and_files_hold_the_results(tmp_path):
    atoms = rattled_molecule("H2O")
    atoms.calc = potential_with().calculator("task0", others=["task1"])
    atoms.get_potential_energy()
    expected = copy.deepcopy(atoms.calc.results)
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(atoms)
        row = database.get(1)
    atoms.write(tmp_path / "a.traj")
    atoms.write(tmp_path / "a.extxyz")
    atoms.write(tmp_path / "a.json")
    frozen = atoms.copy()
    frozen.calc = SinglePointCalculator(frozen, **atoms.calc.results)
    for kept in (row.toatoms(), *(read(tmp_path / f"a.{suffix}") for suffix in ("traj", "extxyz", "json")), frozen):
        for name in ("energy", "forces", "charges", "dipole", "magmoms", "magmom"):
            np.testing.assert_allclose(kept.calc.results[name], expected[name], rtol=0, atol=1e-7, err_msg=name)
    assert row.energy == expected["energy"] and np.array_equal(row.charges, expected["charges"])


def test_nothing_is_left_of_the_structure_before_a_failure():
    calculator = Potential(small_model()).calculator("task0")
    water, gold = rattled_molecule("H2O"), Atoms("Au2", [[0, 0, 0], [0, 0, 3.0]])
    nan = Atoms("H2", [[0, 0, 0], [0, 0, np.nan]])
    for bad in (gold, nan, Atoms(), Atoms("H2", [[0, 0, 0], [0, 0, 0.001]])):
        calculator.calculate(water)
        energy = calculator.results["energy"]
        with pytest.raises(StructureError):
            calculator.calculate(bad)
        assert calculator.results == {} and calculator.extras == {}
        assert calculator.get_property("energy", bad, allow_calculation=False) is None
        for _ in range(2):
            with pytest.raises(StructureError):
                calculator.get_potential_energy(bad)
        with pytest.raises(StructureError):
            calculator.get_potential_energy()  # of the last structure
        assert calculator.get_potential_energy(water) == energy


def test_a_failure_in_the_model_or_in_a_warning_leaves_nothing_either(monkeypatch):
    model = small_model()
    model.tasks[1] = facts("task1", elements=["H"])
    calculator = Potential(model).calculator("task0", others=["task1"])
    with pytest.warns(ExtrapolationWarning):
        calculator.calculate(rattled_molecule("H2O"))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(calculator.potential, "rows_of", fail)
        with pytest.raises(torch.OutOfMemoryError):
            calculator.calculate(rattled_molecule("CH4"))
    assert calculator.results == {} and calculator.extras == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ExtrapolationWarning):
            calculator.calculate(rattled_molecule("CO2"))
    assert calculator.results == {} and calculator.extras == {}
    calculator.calculate(rattled_molecule("H2O"))
    calculator.reset()
    assert calculator.extras == {} and calculator.atoms is None


def test_stress_of_a_molecule_is_an_error_and_not_that_of_the_crystal_before():
    calculator = Potential(small_model()).calculator("task0")
    calculator.get_stress(rattled_crystal())
    with pytest.raises(PropertyNotImplementedError, match="stress needs a periodic structure"):
        calculator.get_stress(rattled_molecule())
    assert "stress" not in calculator.results


def test_calculators_are_copied_and_pickled_after_compiled_use(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    atoms = rattled_molecule("H2O")
    atoms.calc = Potential(small_model()).calculator("task0", compile=True)
    energy = atoms.get_potential_energy()
    for copied in (copy.deepcopy(atoms), pickle.loads(pickle.dumps(atoms))):
        assert copied.calc is not atoms.calc and copied.calc.results["energy"] == energy
        copied.positions += 0.01
        assert copied.get_potential_energy() == pytest.approx(energy, abs=1e-9)
    moved = pickle.loads(pickle.dumps(atoms.calc.potential))
    assert moved.predict(atoms, "task0")[0]["energy"] == pytest.approx(energy, abs=1e-9)


def test_predictions_do_not_depend_on_modes_of_the_caller(tmp_path):
    save_model(small_model("mace"), tmp_path / "m.safetensors", dtype="float64")
    atoms, fresh = rattled_crystal(), load_model(tmp_path / "m.safetensors")
    expected = fresh.predict([atoms])
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            potential = load_model(tmp_path / "m.safetensors")
            rows = potential.predict([atoms])
            calculator = potential.calculator("task0")
            forces = calculator.get_forces(atoms)
        np.testing.assert_array_equal(rows[0]["forces"], expected[0]["forces"])
        np.testing.assert_allclose(forces, expected[0]["forces"], atol=1e-9)
        np.testing.assert_allclose(
            calculator.get_forces(rattled_crystal(1)),
            fresh.calculator("task0").get_forces(rattled_crystal(1)),
            atol=1e-9,
        )  # what was made in that mode does not stay behind


def test_the_callers_autocast_rounds_nothing():
    potential, atoms = Potential(small_model(dtype=torch.float32)), rattled_crystal()
    expected = potential.predict(atoms, "task0")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = potential.predict(atoms, "task0")[0]
        forces = potential.calculator("task0").get_forces(atoms)
    assert found["energy"] == expected["energy"] and np.array_equal(found["forces"], expected["forces"])
    np.testing.assert_allclose(forces, expected["forces"], atol=1e-6)


def test_one_structure_and_one_task_need_no_list():
    potential = potential_with()
    water = rattled_molecule("H2O")
    (alone,), (listed,) = potential.predict(water, tasks="task0"), potential.predict([water], tasks=["task0"])
    assert alone["energy"] == listed["energy"] and alone["task"] == "task0" and len(potential.predict(water)) == 2
    assert type(alone["targets"]["gap"]) is float and alone["targets"]["charges"].dtype == np.float64


def test_partial_occupancies_are_refused():
    salt = bulk("NaCl", "rocksalt", a=5.6)
    salt.info["occupancy"] = {"0": {"Na": 0.6, "Li": 0.4}, "1": {"Cl": 1.0}}
    potential = Potential(small_model())
    for use in (lambda: potential.predict(salt), lambda: potential.calculator("task0").get_potential_energy(salt)):
        with pytest.raises(StructureError, match="a site is shared by several elements"):
            use()


@pytest.mark.parametrize("number", [0, 119, 256 + 8, 285])
def test_numbers_that_are_no_elements_are_refused(number):
    potential = Potential(small_model())
    atoms = molecule("H2O")
    atoms.numbers[0] = number
    with pytest.raises(StructureError, match=f"structure 0: atomic number {number} is not an element"):
        potential.predict([atoms])
    with pytest.raises(StructureError, match=f"atomic number {number} is not an element"):
        potential.calculator("task0").get_potential_energy(atoms)
