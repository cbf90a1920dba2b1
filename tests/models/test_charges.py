"""Charge and spin are never lost on the way to a model that depends on them."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ase import Atoms
from ase.io import write
from click.testing import CliRunner
from structures import facts, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.launch.cli.main import main
from hydrazero.models import Potential, save_model
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.extrapolation import ExtrapolationWarning
from hydrazero.shards.errors import ConfigError, ModelFileError, StructureError
from hydrazero.shards.structure import charge_of, multiplicity_of

CPU = torch.device("cpu")


def charged_potential(**values: object) -> Potential:
    """Return a potential of 'charged', which depends on charge and spin, and 'neutral', which does not."""
    torch.manual_seed(3)
    tasks = [facts("charged", charge_spin=True, **values), facts("neutral")]
    return Potential(AtomisticModel(small_model().settings, tasks).double())


def water(**info: object) -> Atoms:
    atoms = rattled_molecule("H2O")
    atoms.info.update(info)
    return atoms


@pytest.mark.parametrize(
    ("value", "right"), [(1, 1), ("+1", 1), (np.int64(-2), -2), (-1e-10, 0), (-0.9999999987, -1), (np.array([1]), 1)]
)
def test_whole_numbers_are_read_within_rounding(value, right):
    assert charge_of(value) == right and charge_of(None) == multiplicity_of(None) == 0
    (row,) = charged_potential().predict(water(charge=value), "charged")
    assert row["energy"] == charged_potential().predict(water(charge=right), "charged")[0]["energy"]


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"charge": 0.5}, r"atoms.info\['charge'\] is 0.5, not a whole number"),
        ({"charge": "plus"}, "is 'plus', not a whole number"),
        ({"charge": [1, 0]}, "has 2 numbers, not one"),
        ({"charge": np.nan}, "is nan, not a whole number"),
        ({"charge": 1e9}, "is 1e\\+09, beyond 32767"),
        ({"multiplicity": 0}, "is 0; a spin multiplicity 2S\\+1 is at least 1"),
        ({"multiplicity": -3}, "is -3; a spin multiplicity 2S\\+1 is at least 1"),
        ({"multiplicity": 1.5}, "is 1.5, not a whole number"),
        ({"total_charge": 1}, "its 'total_charge' is 1, but the charge is read from 'charge', which is not there"),
        ({"Charge": -1}, "its 'Charge' is -1, but the charge is read from 'charge'"),
        ({"spin": 3}, "its 'spin' is 3, but the multiplicity is read from 'multiplicity'"),
        ({"charge": 1, "spin_multiplicity": 2}, "its 'spin_multiplicity' is 2"),
    ],
)
def test_charges_that_cannot_be_read_are_refused(info, words):
    potential = charged_potential()
    calculator = potential.calculator("charged")
    calculator.get_potential_energy(water())
    with pytest.raises(StructureError, match=words):
        potential.predict(water(**info), "charged")
    for _ in range(2):
        with pytest.raises(StructureError, match=words):
            calculator.get_potential_energy(water(**info))
    assert calculator.results == {}


def test_initial_charges_without_a_charge_are_refused():
    atoms = water()
    atoms.set_initial_charges([0.4, 0.3, 0.3])
    potential = charged_potential()
    with pytest.raises(StructureError, match=r"its 'initial_charges' is 1\.0, but the charge is read from 'charge'"):
        potential.predict(atoms, "charged")
    with pytest.raises(StructureError, match="'initial_charges'"):
        potential.calculator("charged").get_potential_energy(atoms)
    atoms.set_initial_charges([-0.6, 0.3, 0.3])
    assert potential.predict(atoms, "charged")[0]["energy"] == potential.predict(water(), "charged")[0]["energy"]


def test_a_task_that_ignores_charge_says_so():
    potential = charged_potential()
    words = r"^task 'neutral' ignores the charge \+1 of structure 0: its head does not depend on charge and spin\.$"
    with pytest.warns(ExtrapolationWarning, match=words) as found:
        potential.predict([water(charge=1), water(charge=1)])
    assert len(found) == 1
    calculator = potential.calculator("neutral")
    with pytest.warns(ExtrapolationWarning, match="the charge -1 and spin multiplicity 3 of H2O: its head"):
        calculator.get_potential_energy(water(charge=-1, multiplicity=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        potential.predict([water(), water(charge=0, multiplicity=2)])
        potential.predict([water(charge=1)], "charged")


def screened(folder: Path, *options: object) -> tuple[list[dict], str]:
    save_model(charged_potential().model, folder / "m.safetensors", dtype="float64")
    given = ["screen", folder / "m.safetensors", *options, "--out", folder / "s.parquet", "--workers", 0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = CliRunner().invoke(main, list(map(str, given)))
    assert done.exit_code == 0, done.output
    return pq.read_table(folder / "s.parquet").to_pylist(), " ".join(str(each.message) for each in caught)


def test_a_screen_computes_no_charged_structure_as_neutral(tmp_path):
    given = water()
    given.set_initial_charges([0.4, 0.3, 0.3])
    write(tmp_path / "a.traj", [water(charge=1), water(total_charge=1), water(total_charge=0), given, water(spin=2)])
    rows, said = screened(tmp_path, tmp_path / "a.traj", "--tasks", "charged,neutral")
    right = charged_potential().predict([water(charge=1), water()], "charged")
    assert rows[0]["energy_charged"] == pytest.approx(right[0]["energy"], abs=1e-6)
    assert rows[2]["energy_charged"] == pytest.approx(right[1]["energy"], abs=1e-6)
    for row, name in (
        (rows[1], "'total_charge' is 1"),
        (rows[3], "'initial_charges' is 1.0"),
        (rows[4], "'spin' is 2"),
    ):
        assert name in row["reason"] and row["energy_charged"] is None
    assert "task 'neutral' ignores the charge +1 of a.traj#0: its head does not depend on charge and spin" in said


def with_initial_charges(*charges: float) -> Atoms:
    atoms = water()
    atoms.set_initial_charges(charges)
    return atoms


@pytest.mark.parametrize(
    ("atoms", "words"),
    [
        (water(total_charge=1), "'total_charge' 1"),
        (water(Charge=-1), "'Charge' -1"),
        (water(spin=1), "'spin' 1"),
        (water(spin_multiplicity=3), "'spin_multiplicity' 3"),
        (with_initial_charges(0.4, 0.3, 0.3), r"'initial_charges' 1\.0"),
    ],
)
def test_a_charge_under_another_name_that_a_task_ignores_is_warned_of(atoms, words, tmp_path):
    potential = charged_potential()
    right = potential.predict(water(), "neutral")[0]["energy"]
    with pytest.warns(ExtrapolationWarning, match=f"^task 'neutral' ignores the {words} of structure 1: its head"):
        assert potential.predict([water(), atoms], "neutral")[1]["energy"] == pytest.approx(right, abs=1e-9)
    calculator = potential.calculator("neutral")
    calculator.get_potential_energy(water())
    with pytest.warns(ExtrapolationWarning, match=f"^task 'neutral' ignores the {words} of H2O: its head"):
        calculator.get_potential_energy(atoms)
    write(tmp_path / "a.traj", [water(), atoms])
    rows, said = screened(tmp_path, tmp_path / "a.traj", "--tasks", "neutral")
    assert rows[1]["energy_neutral"] == pytest.approx(right, abs=1e-6)
    assert re.search(f"task 'neutral' ignores the {words} of a.traj#1: its head", said)


def test_charges_and_missing_tasks_of_a_calculator_are_one_sentence():
    potential = charged_potential()
    with pytest.raises(ModelFileError, match=r"^name the task of the calculator .* has 'charged', 'neutral'\.$"):
        potential.calculator()
    with pytest.raises(ModelFileError, match=r"takes no charge: .* as atoms\.info\['charge'\]\.$"):
        potential.calculator("charged", charge=1)
    with pytest.raises(TypeError, match="no argument 'skim'"):
        potential.calculator("charged", skim=1)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_one_sentence(device):
    with pytest.raises(ConfigError, match=f"^device '{device}' is not available here; use device='cpu'\\.$"):
        Potential(small_model(), device)


def test_warnings_of_commands_show_no_source(tmp_path):
    save_model(charged_potential().model, tmp_path / "m.safetensors", dtype="float64")
    write(tmp_path / "a.traj", [water(total_charge=1)])
    words = ("screen", tmp_path / "m.safetensors", tmp_path / "a.traj", "--out", tmp_path / "s.parquet")
    code = "from hydrazero.launch.cli.main import main; main()"
    given = [sys.executable, "-c", code, *map(str, words), "--tasks", "neutral", "--workers", "0"]
    done = subprocess.run(given, capture_output=True, text=True, timeout=100, check=True)
    assert "warning: task 'neutral' ignores the 'total_charge' 1 of a.traj#0: its head" in done.stderr
    assert ".py" not in done.stderr and "warnings.warn" not in done.stderr


def test_names_that_hold_nothing_unusual_are_not_warned_of():
    potential = charged_potential()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for atoms in (water(total_charge=0, spin_multiplicity=1), with_initial_charges(-0.6, 0.3, 0.3)):
            potential.predict(atoms, "neutral")
            potential.calculator("neutral").get_potential_energy(atoms)


def test_the_reason_names_all_tasks_that_do_not_support_a_structure(tmp_path):
    model = small_model(tasks=3)
    model.tasks[1], model.tasks[2] = facts("b", elements=["H", "C"]), facts("c", elements=["O"])
    potential = Potential(model)

    def why(atoms: Atoms, *tasks: str) -> str | None:
        return potential.why_none(to_structure(atoms), tasks)

    assert why(water(), "task0", "b") is None
    assert why(water(), "b") == "holds O, which task 'b' was not trained on"
    both = "holds O, which task 'b' was not trained on, and holds H, which task 'c' was not trained on"
    assert why(water(), "b", "c") == both
    assert why(Atoms("AuH"), "b", "c") == "holds Au, which none of the tasks b, c was trained on"
    save_model(model, tmp_path / "m.safetensors")
    write(tmp_path / "a.extxyz", [rattled_molecule("H2O"), rattled_molecule("CH4")])
    given = [
        "screen",
        tmp_path / "m.safetensors",
        tmp_path / "a.extxyz",
        "--tasks",
        "b,c",
        "--out",
        tmp_path / "s.parquet",
    ]
    assert CliRunner().invoke(main, list(map(str, given))).exit_code == 0
    assert pq.read_table(tmp_path / "s.parquet").to_pylist()[0]["reason"] == both


def test_states_of_torch_sim_without_charges_are_refused():
    ts = pytest.importorskip("torch_sim")
    potential = charged_potential()
    state = ts.io.atoms_to_state([water(charge=1, multiplicity=2), water()], CPU, torch.float64)
    with pytest.raises(ConfigError, match="task 'charged' depends on charge and spin, and the state has no charge"):
        potential.torch_sim("charged")(state)
    ionised, neutral = (
        row["energy"] for row in potential.predict([water(charge=1, multiplicity=2), water()], "charged")
    )
    given = {**vars(state), "charge": torch.tensor([1, 0]), "spin": torch.tensor([2, 0])}
    assert potential.torch_sim("charged")(given)["energy"].tolist() == pytest.approx([ionised, neutral], abs=1e-9)
    same = potential.torch_sim("charged", charge=1, multiplicity=2)(state)["energy"].tolist()
    assert same == pytest.approx([ionised, ionised], abs=1e-9)
    relaxed = ts.optimize(state, potential.torch_sim("charged", charge=0), optimizer=ts.optimizers.fire, max_steps=2)
    assert relaxed.energy.shape == (2,)
    with pytest.raises(ConfigError, match="charge has 3 numbers for 2 systems"):
        potential.torch_sim("charged")({**given, "charge": torch.tensor([1, 0, 0])})
    with pytest.raises(StructureError, match=r"the charge is 0\.5, not a whole number"):
        potential.torch_sim("charged")({**given, "charge": torch.tensor([0.5, 0])})
    with pytest.warns(ExtrapolationWarning, match="charge"):
        potential.torch_sim("neutral")(given)
    with pytest.warns(ExtrapolationWarning, match="task 'neutral' ignores the 'total_charge' 1"):
        potential.torch_sim("neutral")({**vars(state), "total_charge": torch.tensor([1, 0])})
    with pytest.raises(StructureError, match="'multiplicity' is 2, but the multiplicity is read from 'spin'"):
        potential.torch_sim("charged")({**vars(state), "charge": torch.tensor([1, 0]), "multiplicity": 2})
    numbers = torch.where(state.atomic_numbers == 8, 264, state.atomic_numbers)
    with pytest.raises(StructureError, match="atomic number 264 is not an element"):
        potential.torch_sim("neutral")({**vars(state), "atomic_numbers": numbers})


def test_a_slab_that_torch_sim_has_made_a_cluster_of_is_warned_of():
    ts = pytest.importorskip("torch_sim")
    slab = rattled_crystal()
    slab.pbc = (True, True, False)
    model = charged_potential().torch_sim("neutral")
    with pytest.warns(UserWarning, match="has cells, but is not periodic"):
        model(ts.io.atoms_to_state([slab], CPU, torch.float64))
