"""Fine-tuning: heads that begin as old ones, what each method trains, units that are wrong, what is forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from placed import make_split_shards
from structures import facts, rattled_molecule, small_model

from hydrazero.launch.cli.main import main
from hydrazero.models import Potential, load_model, save_model
from hydrazero.models.encoders import ENCODERS
from hydrazero.models.task_facts import task_facts_from
from hydrazero.shards.files import read_json
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.stream.deal import Deal, TaskPlan, mixture_repeats
from hydrazero.shards.units import energy_factor, force_factor
from hydrazero.trainer.checkpoint.model_of_run import model_of_run
from hydrazero.trainer.config.finetune_section import FinetuneSection
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.engine.low_rank import add_low_rank_changes, merged
from hydrazero.trainer.finetune import plan
from hydrazero.trainer.finetune.outcome import worse_than_before
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, read_metrics
from hydrazero.trainer.start.methods import rate_factors
from hydrazero.trainer.start.unit_check import ENERGY_UNITS, FORCE_UNITS, Likeness, suspicion

OFFSETS = {"H": 1.25, "C": -40.0, "O": 7.0}
"""eV, by which the new data's energies differ from what their teacher, a head of the old model, predicts."""
NAMES = ("H2O", "CH4", "CH3OH", "CO2", "H2CO")


def taught(potential: Potential, count: int, seed: int, factor: float = 1.0) -> list[Atoms]:
    """Molecules with the labels of the head 'task1', energies shifted by element; in another unit with a factor."""
    frames = [rattled_molecule(NAMES[n % len(NAMES)], seed=1000 * seed + n) for n in range(count)]
    for atoms, row in zip(frames, potential.predict(frames, tasks=["task1"]), strict=True):
        energy = row["energy"] + sum(OFFSETS[symbol] for symbol in atoms.get_chemical_symbols())
        atoms.calc = SinglePointCalculator(atoms, energy=factor * energy, forces=factor * row["forces"])
    return frames


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "old.safetensors"
    save_model(small_model(tasks=3, dtype=torch.float32), path)
    return path


@pytest.fixture(scope="module")
def data(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards 'new', taught by task1, 'kcal', the same in another unit, and 'task0', an old task's."""
    root, potential = tmp_path_factory.mktemp("finetune"), load_model(teacher)
    splits = {"train": taught(potential, 20, 1), "val": taught(potential, 10, 2), "test": taught(potential, 5, 3)}
    make_split_shards(root, "new", **splits)
    make_split_shards(root, "kcal", train=taught(potential, 20, 1, 23.0605))
    make_split_shards(root, "task0", train=taught(potential, 20, 4), test=taught(potential, 5, 5))
    return root


def finetune(*words: object) -> Result:
    return CliRunner().invoke(main, ["finetune", *map(str, words)])


def done(*words: object) -> Result:
    result = finetune(*words)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("method", ["full", "heads", "lora", "layerwise"])
def test_without_training_nothing_changes_but_the_offset(teacher, data, tmp_path, method):
    out = tmp_path / "run"
    said = done(teacher, data / "new", "--out", out, "--method", method, "--steps", 1, "--lr", 0)
    assert load_run_config(out / "run.toml").tasks[0].init_head == "task1"  # of lowest force error: its own teacher
    old, new = load_model(teacher), Potential(model_of_run(out))
    atoms = [rattled_molecule(name, seed=77) for name in NAMES]
    rows = zip(atoms, old.predict(atoms, tasks=["task1"]), new.predict(atoms), strict=True)
    for each, before, after in rows:
        offset = sum(OFFSETS[symbol] for symbol in each.get_chemical_symbols())
        assert after["energy"] == pytest.approx(before["energy"] + offset, abs=2e-4)
        np.testing.assert_allclose(after["forces"], before["forces"], atol=1e-5)
    outcome = read_json(out / "finetune.json")
    assert outcome["begun_as"] == ["task1"] and outcome["split"] == "test"
    for when in ("before", "after"):
        assert outcome[when]["energy_mae_mev_per_atom"] < 0.05 and outcome[when]["force_mae_mev_per_angstrom"] < 0.05
    assert "hydrazero export" in said.output and "references refitted" in said.output


def changed(teacher: Path, run: Path, averaged: bool = False) -> dict[str, torch.Tensor]:
    """How far a run has moved weights that its model shares with its start."""
    old, new = load_model(teacher).model.state_dict(), model_of_run(run, "last", averaged=averaged).state_dict()
    return {name: value - old[name] for name, value in new.items() if name.startswith(("encoder.", "embedding."))}


SHORT = ("--steps", 6, "--set", "train.average=0.5", "--lr", 0.01)


def test_heads_alone(teacher, data, tmp_path):
    done(teacher, data / "new", "--out", tmp_path / "run", "--method", "heads", *SHORT)
    assert not any(value.any() for value in changed(teacher, tmp_path / "run").values())
    old = load_model(teacher).model.energy_head.first.weight[1]
    assert not torch.equal(model_of_run(tmp_path / "run").energy_head.first.weight[0], old)


@pytest.mark.parametrize(("config", "compiled"), [("zero1", "false"), ("zero1", "true"), ("zero3", "false")])
def test_low_rank_changes(teacher, data, tmp_path, monkeypatch, config, compiled):
    """Of the rank that was asked for, part of the weights in an export, and the same through a resume."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    common = [teacher, data / "new", "--method", "lora", *SHORT, "--set", "finetune.rank=2"]
    common += ["--set", f"deepspeed.config={config}", "--set", f"train.compile={compiled}"]
    common += ["--set", "train.checkpoint_every=3", "--set", "data.workers=0", "--set", "train.patience=0"]
    run = tmp_path / "run"
    done(*common, "--out", run)
    for averaged in (False, True):
        moved = changed(teacher, run, averaged)
        maps = {name: value for name, value in moved.items() if name.startswith("encoder.") and value.dim() == 2}
        assert maps and all(torch.linalg.matrix_rank(value, tol=1e-5) == 2 for value in maps.values())
        assert not any(v.any() for name, v in moved.items() if name.startswith("encoder.") and v.dim() == 1)
    evaluations = [row for row in read_metrics(run) if row["kind"] == "evaluation"]
    exported = CliRunner().invoke(main, ["export", str(run), "--out", str(tmp_path / "m.safetensors"), "--old-heads"])
    assert exported.exit_code == 0
    assert load_model(tmp_path / "m.safetensors").tasks == ["new", "task0", "task1", "task2"]
    again = CliRunner().invoke(main, ["evaluate", str(tmp_path / "m.safetensors"), str(data / "new"), "--split", "val"])
    assert again.exit_code == 0
    val = read_json(tmp_path / "m.evaluation.json")["tasks"]["new"]
    best = min(evaluations, key=lambda row: row["loss"])["tasks"]["new"]  # of the averaged adapters, as trained
    assert val["force_mae_mev_per_angstrom"] == pytest.approx(best["force_mae_mev_per_angstrom"], rel=1e-3)
    whole = model_of_run(run, "last", averaged=False).state_dict()
    for path in (run / "checkpoints").glob("step-*6"):
        path.rename(tmp_path / "gone")
    (run / "checkpoints" / "best.json").unlink(missing_ok=True)
    resumed = CliRunner().invoke(main, ["train", str(run / "run.toml"), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    for name, value in model_of_run(run, "last", averaged=False).state_dict().items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_low_rank_changes_of_every_encoder(encoder):
    model, plain = small_model(encoder), small_model(encoder)
    atoms = [rattled_molecule()]
    add_low_rank_changes(model.encoder, 2)
    assert Potential(plain).predict(atoms)[0]["energy"] == Potential(model).predict(atoms)[0]["energy"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.1)
    plain.load_state_dict(merged(model.state_dict()), strict=True)
    ours, theirs = (Potential(each).predict(atoms)[0] for each in (model, plain))
    np.testing.assert_allclose(ours["forces"], theirs["forces"], atol=1e-9)
    assert np.abs(ours["forces"] - Potential(small_model(encoder)).predict(atoms)[0]["forces"]).max() > 1e-6


@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_rates_fall_from_the_heads_to_the_embedding(encoder):
    names = [name for name, _ in small_model(encoder).named_parameters()]
    factors = rate_factors(names, FinetuneSection(method="layerwise", layer_decay=0.5))
    assert {factors[name] for name in names if name.startswith("energy_head.")} == {1.0}
    of_encoder = {factors[name] for name in names if name.startswith("encoder.")}
    assert 0.5 in of_encoder and len(of_encoder) >= 2 and min(of_encoder) > factors["embedding.elements"]
    assert set(rate_factors(names, FinetuneSection()).values()) == {1.0}


def test_layers_have_rates_of_their_own(teacher, data, tmp_path):
    """AdamW's first step moves every weight by its rate, whatever the gradient."""
    out = tmp_path / "run"
    steps = ["--steps", 1, "--lr", 0.01, "--set", "deepspeed.optimizer.params.weight_decay=0.0"]
    steps += ["--set", "deepspeed.scheduler.type=WarmupPlateauLR"]
    steps += ["--set", "deepspeed.scheduler.params.warmup_num_steps=0"]
    done(teacher, data / "new", "--out", out, "--method", "layerwise", *steps)
    moved = {name: float(value.abs().max()) for name, value in changed(teacher, out).items()}
    assert moved["encoder.updates.1.gates_out.weight"] == pytest.approx(5e-3, rel=0.01)
    assert moved["encoder.updates.0.gates_out.weight"] == pytest.approx(2.5e-3, rel=0.01)
    assert moved["embedding.elements"] == pytest.approx(1.25e-3, rel=0.01)
    one_rate = ["--method", "layerwise", "--set", "deepspeed.scheduler.type=WarmupLR"]
    refused = finetune(teacher, data / "new", "--out", tmp_path / "b", *one_rate)
    assert refused.exit_code == 1 and "has only one; choose" in refused.output


def test_labels_in_another_unit_are_refused(teacher, data, tmp_path):
    out = tmp_path / "run"
    result = finetune(teacher, data / "kcal", "--out", out)
    assert result.exit_code == 1 and not out.exists() and "kcal/mol" in result.output.splitlines()[-1]
    assert "23.1 times" in result.output and "correlation 1.00" in result.output
    done(teacher, data / "kcal", "--out", out, "--steps", 1, "--set", "finetune.check_units=false")
    # A run file that nobody has worked out is checked as well, before its first step.
    text = (out / "run.toml").read_text().replace("check_units = false", "check_units = true")
    (tmp_path / "by_hand.toml").write_text(text.replace('"task1"', '"nearest"'))
    again = CliRunner().invoke(main, ["train", str(tmp_path / "by_hand.toml"), "--set", f"run.out={tmp_path / 'c'}"])
    assert again.exit_code == 1 and "kcal/mol" in again.output and not (tmp_path / "c").exists()


@given(st.sampled_from([*ENERGY_UNITS, *FORCE_UNITS]), st.booleans(), st.floats(0.95, 1.05), st.floats(0.96, 1.0))
def test_every_unit_is_recognised(unit, read_as_it, noise, correlation):
    forces = unit in FORCE_UNITS
    factor = force_factor(unit) if forces else energy_factor(unit)
    found = Likeness(ratio=noise * (factor if read_as_it else 1 / factor), correlation=correlation)
    what = "forces" if forces else "energies"
    said = suspicion(what, found)
    assert said is not None and "most likely" in said
    if 0.985 < noise < 1.015:  # meV/Å and kJ/mol/nm are 3.6% apart
        assert unit in said
    assert suspicion(what, Likeness(ratio=found.ratio, correlation=0.7)) is None
    assert suspicion(what, Likeness(ratio=1.6 * noise, correlation=correlation)) is None


def test_forces_of_the_opposite_sign():
    assert "opposite sign" in (suspicion("forces", Likeness(ratio=1.0, correlation=-0.97)) or "")


def test_old_tasks_are_measured_and_replayed(teacher, data, tmp_path):
    out = tmp_path / "run"
    steps = ["--steps", 30, "--lr", 0.003]
    # What is measured on the way leaves the weights as they are.
    steps += [f"--set={change}" for change in ("train.log_every=30", "train.patience=0", "balance.every=5")]
    said = done(teacher, data / "new", "--out", out, "--replay", 0.25, "--replay-data", data / "task0", *steps)
    (row,) = [row for row in read_metrics(out) if row["kind"] == "train"]
    assert row["sampling_shares"]["task0"] == pytest.approx(0.25, abs=0.06)
    assert row["weights"]["task0"] / row["weights"]["new"] == pytest.approx(1 / 3)
    old = read_json(out / "finetune.json")["old"]["task0"]
    assert old["split"] == "test" and old["before"]["structures"] == old["after"]["structures"] == 5
    assert old["before"]["force_mae_mev_per_angstrom"] != old["after"]["force_mae_mev_per_angstrom"]
    assert "old tasks, before and after" in said.output
    stored = {task["name"]: task for task in read_json(out / MODEL_FACTS_NAME)["tasks"]}
    kept = {task.name: task for task in load_model(teacher).model.tasks}["task0"]
    assert task_facts_from(stored["task0"]) == kept  # as it was, whatever the shards hold of its elements
    assert stored["new"]["elements"] == ["C", "H", "O"]


def test_an_encoder_that_stays_forgets_nothing(teacher, data, tmp_path):
    out = tmp_path / "run"
    done(teacher, data / "new", "--out", out, "--method", "heads", "--replay-data", data / "task0", *SHORT)
    old = read_json(out / "finetune.json")["old"]["task0"]
    assert old["before"] == old["after"]


def test_other_first_heads(teacher, data, tmp_path):
    old = load_model(teacher).model
    done(teacher, data / "new", "--out", tmp_path / "mean", "--init-head", "mean", "--steps", 1, "--lr", 0)
    mean = model_of_run(tmp_path / "mean")
    torch.testing.assert_close(mean.energy_head.first.weight[0], old.energy_head.first.weight.mean(0))
    assert mean.tasks[0].scale == pytest.approx(2.0)  # of 1, 2 and 3
    done(teacher, data / "new", "--out", tmp_path / "new", "--init-head", "new", "--steps", 1, "--lr", 0)
    new = model_of_run(tmp_path / "new")
    assert new.tasks[0].reference_energies == pytest.approx(read_manifest(data / "new").reference_energies)
    assert torch.equal(new.embedding.elements, old.embedding.elements)
    done(teacher, data / "new", "--out", tmp_path / "named", "--init-head", "task2", "--steps", 1, "--lr", 0)
    assert torch.equal(model_of_run(tmp_path / "named").energy_head.first.weight[0], old.energy_head.first.weight[2])


def test_elements_that_the_model_has_not_seen(teacher, tmp_path):
    frames = [bulk("Cu", cubic=True) for _ in range(6)]
    for number, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=number)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 * number, forces=np.full((4, 3), 0.1 * number))
    folder = make_split_shards(tmp_path, "copper", train=frames)
    said = done(teacher, folder, "--out", tmp_path / "run", "--method", "heads", "--steps", 1)
    assert "was not trained on Cu" in said.output and "choose another" in said.output
    assert "has no validation structures" in said.output and "cannot be measured" in said.output


@pytest.mark.parametrize(
    ("steps", "batches", "every"),
    [
        (300, 104 / 16, 15),  # 20 evaluations
        (2000, 104 / 16, 100),
        (100, 0.0, 10),  # not every 5 steps
        (300, 30.0, 60),  # 4 steps of training for each of evaluation
        (60, 104 / 8, 15),  # which would be 26 steps, but the best of four evaluations is kept
        (300, 1000.0, 75),
        (6, 1.0, 2),
        (1, 1.0, 1),
    ],
)
def test_evaluations_take_no_more_than_a_fifth_of_the_time(steps, batches, every):
    assert plan._interval(steps, batches) == every
    if batches and every < steps / plan.FEWEST:
        assert plan._share(every, batches) <= 0.2 + 1e-9


def test_a_validation_split_that_takes_most_of_the_time_is_said(teacher, data, tmp_path):
    potential = load_model(teacher)
    large = make_split_shards(tmp_path, "large", train=taught(potential, 6, 1), val=taught(potential, 60, 2))
    said = done(teacher, large, "--out", tmp_path / "run", "--steps", 8, "--lr", 0).output
    assert load_run_config(tmp_path / "run" / "run.toml").train.evaluate_every == 2
    assert "60 validation structures are evaluated every 2 steps, which takes about 79% of the time; hydrazero" in said
    assert f"hydrazero subset {large} --val N keeps fewer." in said
    assert "validation structures are" not in done(teacher, data / "new", "--out", tmp_path / "b", *SHORT).output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--init-head", "task_1"], "did you mean 'task1'"),
        (["--set", "foo.bar=1"], "--set: foo is not known"),
        (["--lr", "nan"], "--lr is nan; it must be a number of at least 0"),
        (["--replay", "0.2"], "--replay needs structures of old tasks"),
        (["--replay", "1.5", "--replay-data", "{data}/task0"], "--replay is 1.5; it must be above 0 and below 1"),
        (["--replay", "0.2", "--replay-data", "{data}/task0", "--method", "heads"], "changes no old task"),
        (["--replay-data", "{data}/new"], "contains task 'new'"),
        (["--replay-data", "{data}/nothing"], "does not exist; name a folder"),
        (["--set", "finetune.rank=0"], "finetune.rank is 0"),
        (["--set", "finetune.layer_decay=2.0"], "finetune.layer_decay is 2.0"),
    ],
)
def test_bad_arguments(teacher, data, tmp_path, words, sentence):
    result = finetune(teacher, data / "new", "--out", tmp_path / "run", *(word.format(data=data) for word in words))
    assert result.exit_code == 1 and sentence in result.output, result.output
    assert list(tmp_path.iterdir()) == []


def test_bad_models_and_folders(teacher, data, tmp_path):
    (tmp_path / "there").mkdir()
    assert "there exists" in finetune(teacher, data / "new", "--out", tmp_path / "there").output
    assert "does not exist" in finetune(tmp_path / "none", data / "new", "--out", tmp_path / "a").output
    potential = load_model(teacher)
    empty = make_split_shards(tmp_path, "empty", train=taught(potential, 2, 9), val=taught(potential, 2, 8))
    document = json.loads((empty / "manifest.json").read_text())
    document["splits"]["test"] += document["splits"]["train"]
    document["splits"]["train"] = []
    (empty / "manifest.json").write_text(json.dumps(document))
    assert "has no training structures" in finetune(teacher, empty, "--out", tmp_path / "a").output
    assert not (tmp_path / "a").exists()


def test_keys_of_a_run_file_that_need_a_start(data, tmp_path):
    text = '[run]\nout = "x"\n[train]\nsteps = 1\n[[tasks]]\nname = "new"\nshards = "s"\n'
    for more, sentence in (
        ('init_head = "nearest"\n', "there is no model with heads"),
        ('[finetune]\nmethod = "lora"\n', "needs a model to start from"),
        ("share = 0.5\n", "add up to 0.5, not to 1"),
        ('share = 1.0\n[[tasks]]\nname = "b"\nshards = "s"\n', "leave nothing for the others"),
    ):
        (tmp_path / "run.toml").write_text(text + more)
        result = CliRunner().invoke(main, ["train", str(tmp_path / "run.toml")])
        assert result.exit_code == 1 and sentence in result.output, result.output


@given(st.lists(st.integers(3, 600), min_size=2, max_size=3), st.floats(0.05, 0.9), st.integers(1, 3))
@settings(max_examples=20)
def test_tasks_have_their_shares(counts, share, lanes):
    """Over some epochs: in each of them passes begin and end with whole pieces of blocks."""
    shares = [None] * (len(counts) - 1) + [share]
    repeats = mixture_repeats(counts, 1.0, shares)
    sizes = [np.array([min(256, n - first) for first in range(0, n, 256)]) for n in counts]
    plans = [TaskPlan(name="a", block_sizes=size, repeats=r) for size, r in zip(sizes, repeats, strict=True)]
    deal = Deal(plans, lanes=lanes, seed=1)
    drawn = np.zeros(len(counts))
    for epoch, lane, index in np.ndindex(20, lanes, len(counts)):
        drawn[index] += deal.piece_sizes(index, deal.lane_pieces(index, epoch, lane)).sum()
    assert drawn[-1] / drawn.sum() == pytest.approx(share, abs=0.05)


def test_a_head_that_knows_all_elements_leaves_open_what_compositions_do(teacher, tmp_path):
    """One composition cannot tell elements apart: the references of the others' levels of theory stay."""
    potential = load_model(teacher)
    frames = [atoms for atoms in taught(potential, 25, 1) if atoms.get_chemical_formula() == "H2O"]
    folder = make_split_shards(tmp_path, "water", train=frames)
    done(teacher, folder, "--out", tmp_path / "run", "--steps", 1, "--lr", 0)
    references = model_of_run(tmp_path / "run").tasks[0].reference_energies
    offset = 2 * OFFSETS["H"] + OFFSETS["O"]
    before = facts("task1").reference_energies
    assert 2 * references["H"] + references["O"] == pytest.approx(2 * before["H"] + before["O"] + offset, abs=1e-3)
    assert references["O"] < 100 * references["H"] < 0  # not one mean for both


@pytest.mark.ranks
def test_two_ranks_begin_with_the_same_head(teacher, data, tmp_path):
    """Also by a run file that leaves it to the run which head is the nearest."""
    done(teacher, data / "new", "--out", tmp_path / "one", "--steps", 1, "--lr", 0)
    text = (tmp_path / "one" / "run.toml").read_text().replace('"task1"', '"nearest"')
    (tmp_path / "run.toml").write_text(text.replace(str(tmp_path / "one"), str(tmp_path / "two")))
    told = CliRunner().invoke(main, ["train", str(tmp_path / "run.toml"), "--dry-run"])
    assert told.exit_code == 0 and "the nearest head is 'task1'" in told.output, told.output
    words = [Path(sys.executable).with_name("hydrazero"), "train", tmp_path / "run.toml", "--ranks", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    trained = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert trained.returncode == 0, trained.stderr
    assert "the nearest head is 'task1'" in trained.stderr
    ours, theirs = (model_of_run(tmp_path / name) for name in ("one", "two"))
    assert theirs.tasks[0].reference_energies == pytest.approx(ours.tasks[0].reference_energies, abs=1e-6)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_a_result_that_is_worse_than_the_start_is_said():
    def outcome(energy: float, force: float | None) -> str:
        tasks = {"before": {"energy_mae_mev_per_atom": 10.0, "force_mae_mev_per_angstrom": 50.0}}
        tasks["after"] = {"energy_mae_mev_per_atom": energy, "force_mae_mev_per_angstrom": force}
        return worse_than_before({"split": "test", **tasks})

    assert outcome(9.0, 50.0) == outcome(9.0, None) == ""
    assert worse_than_before({"split": "test", "before": None, "after": {}}) == ""
    said = outcome(9.0, 60.0)
    assert said.startswith("warning: the fine-tuned head is worse than the head that it started from (force MAE 60 ")
    assert "instead of 50 meV/Å, test split): train longer (--steps)" in said and "energy" not in said
    assert "energy MAE 12 instead of 10 meV/atom" in outcome(12.0, 40.0)
