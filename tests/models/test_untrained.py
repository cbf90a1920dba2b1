"""What a model was not trained on: stress of slabs that it does have, stress that is only derived, open energies."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111, molecule
from click.testing import CliRunner
from placed import make_split_shards
from sources import labelled, metals, molecules, write_extxyz
from structures import batch_of, facts, rattled_crystal, small_model, to_structure

from hydrazero.launch.cli.main import main
from hydrazero.models import Potential, load_model, read_card, save_model
from hydrazero.models.inference.extrapolation import ExtrapolationWarning
from hydrazero.shards.errors import StructureError
from hydrazero.shards.manifest import read_manifest
from hydrazero.trainer.config.sections import LossSection, TaskSection
from hydrazero.trainer.config.tasks import task_facts
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.evaluation.export import _set_trained


def slab(pbc: tuple[bool, bool, bool] = (True, True, False), vacuum: float | None = 6.0) -> Atoms:
    atoms = fcc111("Na", (2, 2, 2), a=4.5, vacuum=vacuum)
    atoms.set_chemical_symbols(["Na", "Cl"] * 4)
    atoms.rattle(0.1, seed=1)
    atoms.pbc = pbc
    return atoms


def strained(atoms: Atoms, row: int, column: int, size: float) -> Atoms:
    change = np.zeros((3, 3))
    change[row, column] += 0.5 * size
    change[column, row] += 0.5 * size
    copy = atoms.copy()
    copy.set_cell(atoms.cell[:] @ (np.eye(3) + change), scale_atoms=False)
    copy.positions = atoms.positions @ (np.eye(3) + change)
    return copy


@pytest.mark.parametrize("pbc", [(True, True, False), (True, False, False), (True, True, True)])
def test_the_stress_of_slabs_is_the_strain_derivative_over_the_volume(pbc):
    potential = Potential(small_model())
    atoms = slab(pbc)
    (row,) = potential.predict([atoms], tasks=["task0"])
    assert row["stress"] is not None
    for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2)):
        two = [strained(atoms, i, j, size) for size in (1e-4, -1e-4)]
        up, down = (found["energy"] for found in potential.predict(two, tasks=["task0"]))
        assert row["stress"][i, j] == pytest.approx((up - down) / 2e-4 / atoms.get_volume(), abs=1e-7), (i, j)
    atoms.calc = potential.calculator("task0")
    np.testing.assert_allclose(atoms.get_stress(voigt=False), row["stress"], atol=1e-9)


@pytest.mark.parametrize("pbc", [(True, True, False), (False, False, False)])
def test_without_a_volume_there_is_no_stress(pbc):
    atoms = slab(pbc, vacuum=None) if any(pbc) else slab(pbc)
    if any(pbc):
        atoms.cell[2] = 0.0
    assert Potential(small_model()).predict([atoms], tasks=["task0"])[0]["stress"] is None


def test_labels_of_slabs_are_trained():
    stress = np.diag([0.01, 0.02, 0.0])
    periodic, alone = slab(), slab((False, False, False))
    batch = batch_of([to_structure(atoms, stress=stress) for atoms in (periodic, alone)])
    assert batch.stress_mask.tolist() == [True, False] and batch.volume[0] == pytest.approx(periodic.get_volume())
    objective = make_objective(small_model(), LossSection(), [1.0, 1.0])
    assert objective.counts(batch)[0, objective.quantities.index("stress")] == 9


def test_a_task_without_stress_says_that_its_stress_is_derived(tmp_path):
    folder = make_split_shards(tmp_path, "task0", train=molecules(4), test=molecules(2))
    own = task_facts(TaskSection(name="task0", shards=str(folder)), read_manifest(folder))
    assert not own.has_stress and own.has_forces and own.untrained == ["stress"]
    crystals = make_split_shards(tmp_path / "b", "task0", train=metals(3), test=metals(1))
    assert task_facts(TaskSection(name="task0", shards=str(crystals)), read_manifest(crystals)).untrained == []
    model = small_model()
    model.tasks = [replace(model.tasks[0], has_stress=False), model.tasks[1]]
    save_model(model, tmp_path / "m.safetensors", dtype="float64")
    card = read_card(tmp_path / "m.safetensors")
    assert card["tasks"]["task0"]["untrained"] == {"stress": "derived from the energy, not trained"}
    assert "untrained" not in card["tasks"]["task1"]
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "m.safetensors")], env={"COLUMNS": "200"}).output
    assert "energy, forces, stress (derived from the energy, not trained)" in " ".join(shown.split())
    potential = load_model(tmp_path / "m.safetensors")
    atoms = rattled_crystal()
    atoms.calc = potential.calculator("task0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.get_potential_energy()
    atoms.rattle(0.01)
    with pytest.warns(
        ExtrapolationWarning,
        match=r"the stress that task 'task0' predicts for \w+ is derived from the energy, not trained\.$",
    ):
        atoms.get_stress()
    atoms.calc = potential.calculator("task1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.get_stress()


@pytest.mark.parametrize(
    ("loss", "untrained"),
    [
        ({}, []),
        ({"stress_weight": 0.0}, ["stress"]),
        ({"stress_weight": 0.0, "final_weights": {"stress": 1.0}}, []),
        ({"forces_weight": 0.0, "stress_weight": 0.0}, ["forces", "stress"]),
    ],
)
def test_weights_of_zero_leave_forces_and_stress_untrained(loss, untrained):
    model = small_model()
    _set_trained(model, {"loss": loss})
    assert [task.untrained for task in model.tasks] == [untrained] * 2
    trained = make_objective(model, LossSection(**loss), [1.0, 1.0]).quantities
    assert ("stress" in trained) == ("stress" not in untrained)


def test_a_weight_before_a_resume_counts_as_training():
    def untrained(old: float) -> list[str]:
        model = small_model()
        change = {"key": "loss.stress_weight", "old": old, "new": 0.0}
        _set_trained(model, {"loss": {"stress_weight": 0.0}, "resumes": [{"changes": [change]}, {"changes": []}]})
        return model.tasks[0].untrained

    assert untrained(0.1) == [] and untrained(0.0) == ["stress"]


@pytest.fixture
def of_one_composition(tmp_path) -> Path:
    model = small_model(tasks=1)
    model.tasks = [facts("task0", undetermined_sums=[{"H": 1.0, "O": -2.0}], has_forces=True)]
    save_model(model, tmp_path / "m.safetensors", dtype="float64")
    return tmp_path / "m.safetensors"


def test_energies_of_other_compositions_are_said_to_be_arbitrary(of_one_composition, tmp_path):
    words = (
        "do not determine the reference energies of H and O separately, so that total energies of other compositions"
    )
    assert words in read_card(of_one_composition)["tasks"]["task0"]["undetermined"]
    shown = CliRunner().invoke(main, ["inspect", str(of_one_composition)], env={"COLUMNS": "250"}).output
    assert words in " ".join(shown.split())
    potential = load_model(of_one_composition)
    water, peroxide = molecule("H2O"), molecule("H2O2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        water.calc = potential.calculator("task0")
        water.get_potential_energy()
        potential.predict([molecule("H2O")])
    peroxide.calc = potential.calculator("task0")
    with pytest.warns(ExtrapolationWarning, match="H2O2: the compositions of the training structures do not determine"):
        peroxide.get_potential_energy()
    with pytest.warns(
        ExtrapolationWarning, match="task 'task0' predicts an arbitrary energy for structure 1: the comp"
    ):
        potential.predict([molecule("H2O"), molecule("H2O2")])
    labelled(molecule("H2O2")).write(tmp_path / "c.extxyz")
    with pytest.warns(ExtrapolationWarning, match="c.extxyz#0: the compositions .* further structures are not named"):
        done = CliRunner().invoke(
            main,
            [
                *map(str, ("screen", of_one_composition, tmp_path / "c.extxyz", "--out", tmp_path / "s.parquet")),
                "--workers",
                "0",
            ],
        )
    assert done.exit_code == 0, done.output


def test_energies_that_are_not_computed_are_not_said_to_be_arbitrary(tmp_path):
    """A task is silent on structures that it does not support, so that the first which it does support is named."""
    model = small_model()
    open_sum = {"undetermined_sums": [{"H": 1.0, "O": -2.0}], "elements": ["H", "O"]}
    model.tasks = [facts("task0"), facts("task1", **open_sum)]
    save_model(model, tmp_path / "m.safetensors", dtype="float64")
    potential = load_model(tmp_path / "m.safetensors")
    acid, peroxide = molecule("HCOOH"), molecule("H2O2")
    acid.info["charge"] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExtrapolationWarning)
        with pytest.raises(StructureError, match="structure 1 holds C, which task 'task1' was not trained on"):
            potential.predict([peroxide, acid], tasks=["task1"])
    write_extxyz(tmp_path / "c.extxyz", [acid, molecule("CO2"), Atoms("Fe"), peroxide])
    words = ["screen", tmp_path / "m.safetensors", tmp_path / "c.extxyz", "--out", tmp_path / "s.parquet"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = CliRunner().invoke(main, [*map(str, words), "--workers", "0"])
    assert done.exit_code == 0, done.output
    said = [str(one.message) for one in caught if issubclass(one.category, ExtrapolationWarning)]
    assert len(said) == 2 and said[0].startswith("task 'task0' ignores the charge +1 of c.extxyz#0")
    assert said[1].startswith("task 'task1' predicts an arbitrary energy for c.extxyz#3: the compositions")
