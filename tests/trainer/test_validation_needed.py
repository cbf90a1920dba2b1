"""Settings that need a validation loss are refused before the first step where the data gives none."""

from __future__ import annotations

from pathlib import Path

import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from click.testing import CliRunner
from run_files import write_small_run
from sources import labelled, make_shards, metals, molecules, write_extxyz

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings

PLATEAU = "deepspeed.scheduler={type = 'WarmupPlateauLR', params = {warmup_num_steps = 1}}"
OFF = "train.keep_best=false"
NO_SPLIT = "no task with a weight above 0 has validation structures"
NO_LABEL = "no validation structure has a label that counts in the loss"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unvalidated")
    everything = {"train": 1.0, "val": 0.0, "test": 0.0}
    make_shards(root, "molecules", molecules(20), split=everything)
    make_shards(root / "validated", "metals", metals(30), split={"train": 0.7, "val": 0.3, "test": 0.0})
    return root


def run_file(folder: Path, data: Path, weight: float) -> Path:
    tasks = [
        {"name": "molecules", "shards": str(data / "molecules")},
        {"name": "metals", "shards": str(data / "validated" / "metals"), "weight": weight},
    ]
    return write_small_run(folder, data, tasks=tasks, train={"steps": 2, "log_every": 1}, data={"workers": 0})


def outcome(*words: object) -> str:
    result = CliRunner().invoke(main, ["train", *map(str, words)])
    assert result.exit_code == (1 if "Error" in result.output else 0), result.output
    return result.output


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ((), "train.keep_best = true needs a validation loss; set train.keep_best = false"),
        (("train.patience=3", OFF), "train.patience = 3 needs a validation loss; set train.patience = 0"),
        ((PLATEAU, OFF), "deepspeed.scheduler.type = WarmupPlateauLR needs a validation loss; choose another"),
    ],
    ids=["keep_best", "patience", "plateau"],
)
def test_without_validation_structures(data, tmp_path, dry, changes, said):
    shown = outcome(run_file(tmp_path, data, 0.0), *dry, *(f"--set={change}" for change in changes))
    assert f"Error: {said}" in shown and NO_SPLIT in shown
    assert not (tmp_path / "run").exists()


def test_a_run_that_needs_none_trains(data, tmp_path):
    shown = outcome(run_file(tmp_path, data, 0.0), f"--set={OFF}")
    said = "task 'molecules' has no validation structures: its errors are not shown during training."
    assert "trained: " in shown and shown.count(said) == 1 and "task 'metals' has no validation" not in shown
    result = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run")])
    assert result.exit_code == 1 and "structures in the split 'test'; evaluate another one (such as --split train)" in (
        result.output
    )


def test_one_task_with_validation_structures_is_enough(data, tmp_path):
    shown = outcome(run_file(tmp_path, data, 1.0), "--dry-run")
    assert "the run can start" in shown and "task 'molecules' has no validation structures" in shown


def with_validation_of(folder: Path, frames: list[Atoms]) -> Path:
    """Write a run on crystals of copper whose validation split holds `frames`."""
    copper = [labelled(bulk("Cu", cubic=True) * (1, 1, 1 + n % 2)) for n in range(12)]
    sources = [write_extxyz(folder / f"{name}.xyz", each) for name, each in (("train", copper), ("val", frames))]
    split = {"train": 1.0, "val": 0.0, "test": 0.0, "val_files": ("*val.xyz",)}
    settings = {"labels": {"require": ("energy",)}, "split": split}
    convert(sources, "metals", folder / "shards", ConvertSettings(**settings))
    tasks = [{"name": "metals", "shards": str(folder / "shards")}]
    return write_small_run(folder, folder, tasks=tasks, train={"steps": 2}, data={"workers": 0})


def test_labels_without_a_weight_are_no_validation(tmp_path):
    """The validation split has energies alone, which do not count where energies have no weight."""
    frames = []
    for size in (1, 2, 3):
        atoms = labelled(bulk("Cu", cubic=True) * (1, 2, 1 + size))
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy())
        frames.append(atoms)
    file = with_validation_of(tmp_path, frames)
    assert "the run can start" in outcome(file, "--dry-run")
    assert NO_LABEL in outcome(file, "--set=loss.energy_weight=0.0")
    assert not (tmp_path / "run").exists()
    assert "trained: " in outcome(file, "--set=loss.energy_weight=0.0", f"--set={OFF}")


def test_structures_with_elements_that_nothing_was_trained_on_are_no_validation(tmp_path):
    file = with_validation_of(tmp_path, [labelled(bulk("Au", cubic=True) * (1, 1, n)) for n in (1, 2)])
    for words in ((), ("--dry-run",)):
        assert NO_LABEL in outcome(file, *words)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_the_run_folder_holds(data, tmp_path):
    file = run_file(tmp_path, data, 1.0)
    outcome(file)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    shown = outcome(file, "--dry-run")
    assert "dry run: nothing was written; the settings can be used, but run folder" in shown
    assert "holds a run already; use --resume" in shown
    assert "the run can be resumed; nothing was written" in outcome(file, "--dry-run", "--resume")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_task_without_weights_names_labels_by_their_usual_names(data, tmp_path):
    file = run_file(tmp_path, data, 1.0)
    weights = [f"--set=loss.{name}_weight=0.0" for name in ("energy", "forces", "stress")]
    assert "holds (energy, forces), nothing is predicted with a weight above 0" in outcome(file, *weights)
