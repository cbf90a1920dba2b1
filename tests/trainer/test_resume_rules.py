"""Runs that are resumed with other settings: each change takes effect, or is refused, and is recorded."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from run_files import write_small_run
from sources import make_shards, metals, molecules

from hydrazero.launch.cli.main import main
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json
from hydrazero.trainer import loop
from hydrazero.trainer.checkpoint.folders import best_checkpoint, checkpoints, folder_of, step_of
from hydrazero.trainer.checkpoint.model_of_run import model_of_run
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.resume_rules import (
    APPLIES,
    COMPARED,
    REFUSED,
    UNUSED,
    changed_settings,
    check_changes,
    default_settings,
    flat_settings,
    rule_of,
)
from hydrazero.trainer.config.run_file import RunConfig, load_run_config
from hydrazero.trainer.config.schedule_shapes import StableDecay
from hydrazero.trainer.records.run_files import read_metrics
from hydrazero.trainer.report.run_data import read_run

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resumed")
    make_shards(root, "molecules", molecules(60))
    make_shards(root, "metals", metals(20))
    return root


TRAIN = {
    "steps": 4,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "average": 0.0,
}


def write_run(folder: Path, data: Path, config: str = "zero0") -> Path:
    return write_small_run(
        folder,
        data,
        train=TRAIN,
        deepspeed={"config": config},
        data={"workers": 0},
        balance={"method": "uniform"},
    )


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, with checkpoints of steps 2 and 4."""
    file = write_run(tmp_path_factory.mktemp("begun"), data)
    train(file)
    return file.parent / "run"


def train(file: Path, *words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["train", str(file), *words])
    assert result.exit_code == status, result.output
    return result


def resume(file: Path, *changes: str, status: int = 0) -> Result:
    return train(file, "--resume", *(f"--set={change}" for change in changes), status=status)


@pytest.fixture
def copied(begun: Path, data: Path, tmp_path: Path) -> Path:
    """The run file of a copy of `begun`."""
    shutil.copytree(begun, tmp_path / "run")
    return write_run(tmp_path, data)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["kind"] == "evaluation"]


def run_file_keys() -> list[str]:
    """Return a key of each setting of a run file."""
    table = {"run": {"out": "x"}, "train": {"steps": 1}, "tasks": [{"name": "a.b", "shards": "s"}]}
    return list(flat_settings({**RunConfig.model_validate(table).model_dump(), "deepspeed": {}}))


@pytest.mark.parametrize("key", [*run_file_keys(), *default_settings(["a"])])
def test_each_key_of_the_run_file_has_a_rule(key):
    rule = rule_of(key)
    assert rule.outcome != REFUSED or rule.why


@pytest.mark.parametrize("name", sorted(path.stem for path in DS_CONFIGS.glob("*.json")))
def test_each_key_of_the_deepspeed_files_has_a_rule(name):
    for key in flat_settings({"deepspeed": deepspeed_config({"config": name}, 100)}):
        assert rule_of(key).outcome in (APPLIES, REFUSED)


def test_settings_of_other_versions_have_no_rule():
    with pytest.raises(
        ConfigError, match=r"has the setting 'data\.later', which this version of hydrazero does not know"
    ):
        rule_of("data.later")


def test_the_manual_shows_the_rules():
    """The first words of a row are keys, and the next cell is what a change of them does."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "resume.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", page, flags=re.MULTILINE)
    rows = [(keys, outcome) for keys, outcome in rows if outcome.startswith((APPLIES, COMPARED, REFUSED, UNUSED))]
    shown = {key: outcome for keys, outcome in rows for key in re.findall(r"`([^`]*)`", keys)}
    for key in run_file_keys():
        named = key.replace("tasks.a.b", "tasks.NAME")
        outcome = shown.get(named) or shown.get(f"{named.partition('.')[0]}.*", "")
        assert outcome.startswith(rule_of(key).outcome), named


def flat(**changes: Any) -> dict[str, Any]:
    return default_settings(["a"]) | flat_settings({"deepspeed": changes})


def test_tables_of_a_precision_that_is_off_do_not_count():
    fp16 = {"enabled": True, "loss_scale": 0, "hysteresis": 2}
    assert [str(change) for change in changed_settings(flat(fp16=fp16), flat())] == [
        "deepspeed.fp16.enabled true → not set"
    ]
    changes = changed_settings(flat(fp16=fp16), flat(fp16={**fp16, "hysteresis": 3}))
    with pytest.raises(ConfigError, match=r"another deepspeed.fp16.hysteresis: it was 2 and is now 3, and the scale"):
        check_changes(changes, "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.seed=5", r"another run.seed: it was 0 and is now 5, and the run's position in its data"),
        ("data.temperature=2.0", r"another data.temperature: it was 1.0 and is now 2.0"),
        ("train.freeze=['encoder.*']", r"another train.freeze: it was [] and is now [\"encoder.*\"]"),
        ("model.features=16", r"another model.features: it was 12 and is now 16"),
        ("model.norm_width=0.2", r"another model.norm_width: it was 0.1 and is now 0.2"),
        ("deepspeed.optimizer.type=Adam", r"another deepspeed.optimizer.type: it was \"AdamW\" and is now \"Adam\""),
        ("deepspeed.scheduler.type=WarmupLR", r"another deepspeed.scheduler.type"),
        (
            "train.steps=3",
            r"train.steps is 3, but run {run} has a checkpoint of step 4 already; set train.steps to at least 4",
        ),
    ],
)
def test_changes_that_cannot_be_are_refused_before_anything_is_written(copied, change, said):
    before = (copied.parent / "run" / "run.json").read_bytes()
    for words in (["--resume"], ["--resume", "--dry-run"]):
        result = train(copied, *words, "--set", change, status=1)
        said_now = said.replace("\\", "").replace("{run}", str(copied.parent / "run"))
        assert result.stderr.startswith("Error: ") and said_now in result.stderr, result.stderr
    assert (copied.parent / "run" / "run.json").read_bytes() == before
    assert [step_of(folder) for folder in checkpoints(copied.parent / "run")] == [2, 4]


def test_other_tasks_and_shards_are_named(copied, data, tmp_path):
    text = copied.read_text()
    copied.write_text(text.replace('name = "metals"', 'name = "metal"'))
    assert "another tasks: it was" in resume(copied, status=1).stderr
    copied.write_text(text.replace('name = "metals"', 'name = "metals"\nforces = "direct"'))
    said = resume(copied, status=1).stderr
    assert 'was started with forces = "conservative" for task \'metals\', and now they would be "direct"' in said
    make_shards(tmp_path / "others", "metals", metals(24))
    copied.write_text(text.replace(f"{data}/metals", f"{tmp_path}/others/metals"))
    assert "others/metals holds other shards than those that run" in resume(copied, status=1).stderr
    shutil.copytree(data, tmp_path / "moved")
    copied.write_text(text.replace(str(data), str(tmp_path / "moved")))
    resume(copied)


def test_a_changed_loss_starts_the_best_anew(copied):
    """The old best, whose loss had another meaning, neither stops the run nor is exported."""
    run = copied.parent / "run"
    result = resume(copied, "loss.energy_weight=1000.0", "loss.stress_weight=0.0", "train.steps=8", "train.patience=2")
    assert "loss.energy_weight 1.0 → 1000.0" in result.stderr
    assert "was measured with other settings: the best checkpoint and train.patience start anew" in result.stderr
    losses = {row["step"]: row["loss"] for row in evaluations(run)}
    assert min(losses[6], losses[8]) > losses[4]  # so that the old best would have stayed
    assert step_of(best_checkpoint(run)) == min((6, 8), key=losses.__getitem__)
    record = read_json(run / "run.json")
    assert record["loss"]["energy_weight"] == 1000.0 and record["train"]["steps"] == 8
    (resumed,) = record["resumes"]
    assert {"key": "loss.energy_weight", "old": 1.0, "new": 1000.0} in resumed["changes"]
    CliRunner().invoke(main, ["report", str(run)])
    assert "Settings changed at step 4: " in (run / "report.html").read_text(encoding="utf-8")


def test_errors_of_an_older_checkpoint_are_not_reported_as_those_of_the_run(copied):
    run = copied.parent / "run"

    def invoke(*words: object) -> str:
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code == 0, result.output
        return result.output

    def page(*runs: Path) -> str:
        invoke("report", *runs, "--out", run.parent / "page.html")
        return (run.parent / "page.html").read_text(encoding="utf-8")

    before = step_of(best_checkpoint(run))
    assert f"checkpoint of step {before}" in invoke("evaluate", run, "--split", "val")
    other = shutil.copytree(run, run.parent / "other")
    assert read_run(run, "run").predictions and not read_run(run, "run").no_errors
    resume(copied, "loss.energy_weight=1000.0", "train.steps=8")
    best = step_of(best_checkpoint(run))
    assert best > before
    said = f"Its last evaluation is of the checkpoint of step {before}, and is left out: "
    said += f"the run&#x27;s best checkpoint is now of step {best}."
    alone = page(run)
    assert said in alone and "Errors on the val split" not in alone and "Parity" not in alone
    both = page(run, other)
    assert said in both and "Errors on the val split. The lowest" in both
    evaluation = read_json(run / "evaluation.json")
    assert evaluation.pop("step") == before
    (run / "evaluation.json").write_text(json.dumps(evaluation))  # an earlier version wrote no step
    assert read_run(run, "run").no_errors.startswith("Its last evaluation is of other weights, and is left out")
    assert read_run(run, "run").evaluation is None and not read_run(run, "run").predictions
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "weights": None, "model": None}))
    assert read_run(run, "run").evaluation is not None
    assert f"checkpoint of step {best}" in invoke("evaluate", run, "--split", "val")
    assert read_run(run, "run").predictions and not read_run(run, "run").no_errors


def test_a_complete_run_is_not_resumed(copied):
    run = copied.parent / "run"
    before = {name: (run / name).read_bytes() for name in ("run.json", "metrics.jsonl")}
    result = resume(copied, "loss.energy_weight=1000.0")
    said = "the run is complete (4 of 4 steps); set train.steps higher to continue it."
    assert result.stderr.count(said) == 1 and result.stdout.strip() == f"complete: {run}"
    assert "resumed from" not in result.output and "settings changed" not in result.output
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_change_counts_again_when_its_steps_were_lost(copied):
    """Killed after the resume, the run has the change in run.json, but no checkpoint that was written with it."""
    run = copied.parent / "run"
    kept = shutil.copytree(run / "checkpoints", run.parent / "kept")
    resume(copied, "loss.energy_weight=1000.0", "train.steps=8")
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(kept, run / "checkpoints")
    result = resume(copied, "loss.energy_weight=1000.0", "train.steps=8")
    assert "loss.energy_weight 1.0 → 1000.0" in result.stderr and "start anew" in result.stderr
    assert step_of(best_checkpoint(run)) > 4
    again = resume(copied, "loss.energy_weight=1000.0", "train.steps=8")
    assert "settings changed" not in again.stderr
    CliRunner().invoke(main, ["report", str(run)])
    assert (run / "report.html").read_text(encoding="utf-8").count("Settings changed at step 4: ") == 1


def test_without_a_change_nothing_is_said_and_the_best_stays(copied):
    run = copied.parent / "run"
    for folder in checkpoints(run)[1:]:
        shutil.rmtree(folder)
    (run / "checkpoints" / "best.json").write_text(json.dumps(evaluations(run)[0] | {"tasks": None}))
    result = resume(copied)
    assert "anew" not in result.stderr and "trained: " in result.stdout and folder_of(run, 4).is_dir()
    assert [change["key"] for change in read_json(run / "run.json")["resumes"][0]["changes"]] == ["run.out"]
    assert "settings changed" not in resume(copied).stderr


Seen = list[dict[str, Any]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The settings of the optimizer in each step."""
    found: Seen = []
    step: Callable[..., Any] = loop.train_step

    def noting(engine: Any, *arguments: Any, **options: Any) -> Any:
        keys = ("lr", "weight_decay", "betas")
        groups = [{key: group[key] for key in keys} for group in engine.optimizer.param_groups]
        found.append({"groups": groups, "clip": getattr(engine.optimizer, "clip_grad", None)})
        return step(engine, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", noting)
    return found


OTHERS = (
    "deepspeed.optimizer.params.lr=0.004",
    "deepspeed.optimizer.params.weight_decay=0.5",
    "deepspeed.optimizer.params.betas=[0.8, 0.99]",
    "deepspeed.gradient_clipping=0.25",
)


@pytest.mark.parametrize("config", ["zero0", "zero1", "zero3", "zero1_bf16"])
def test_the_optimizer_has_the_settings_of_the_resume(data, tmp_path, seen, config):
    """From its first step on, its rates are those of a run that has had these settings all the time."""
    file = write_run(tmp_path, data, config)
    train(file, "--set=train.steps=2", "--set=deepspeed.scheduler.params.total_num_steps=5")
    assert [group["weight_decay"] for group in seen[-1]["groups"]] == [1e-4, 0.0]
    del seen[:]
    resume(file, *OTHERS)
    assert len(seen) == 2
    # DeepSpeed's warm-up takes two steps at least; the first step counts as its second half. Then half a cosine.
    rates = [0.004 * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - 1) / 3)) / 2) for step in (3, 4)]
    for now, rate in zip(seen, rates, strict=True):
        assert now["clip"] == (None if config == "zero0" else 0.25)
        assert [group["lr"] for group in now["groups"]] == pytest.approx([rate, rate], rel=1e-9)
        assert [group["weight_decay"] for group in now["groups"]] == [0.5, 0.0]
        assert [list(group["betas"]) for group in now["groups"]] == [[0.8, 0.99]] * 2


def test_a_rate_takes_effect_in_the_middle_of_a_schedule_of_our_own(data, tmp_path, seen):
    """From the first step on, at its place in the schedule; not at that of the first step of a run."""
    document = deepspeed_config({"config": "zero1"}, 6)
    params = {"total_num_steps": 6, "warmup_num_steps": 2, "decay_share": 0.5}
    document["scheduler"] = {"type": "WarmupStableDecayLR", "params": params}
    (tmp_path / "own.json").write_text(json.dumps(document))
    file = write_run(tmp_path, data, str(tmp_path / "own.json"))
    train(file)
    del seen[:]
    resume(file, "train.steps=6", "deepspeed.optimizer.params.lr=0.004")
    shape = StableDecay(**params)
    rates = [[group["lr"] for group in step["groups"]] for step in seen]
    assert rates == [pytest.approx([0.004 * shape.ratio(step, 0)] * 2) for step in (5, 6)]


def test_a_rate_without_a_schedule_takes_effect(data, tmp_path, seen):
    document = deepspeed_config({"config": "zero1"}, 4)
    del document["scheduler"]
    (tmp_path / "plain.json").write_text(json.dumps(document))
    file = write_run(tmp_path, data, str(tmp_path / "plain.json"))
    train(file)
    before = model_of_run(tmp_path / "run", "last").state_dict()
    resume(file, "train.steps=6", "deepspeed.optimizer.params.lr=0.0")
    assert [step["groups"][0]["lr"] for step in seen] == [0.001] * 4 + [0.0] * 2
    for name, value in model_of_run(tmp_path / "run", "last").state_dict().items():
        assert torch.equal(value, before[name]), name


def test_settings_of_older_runs_are_those_of_their_start(copied):
    """Their checkpoints and resumes hold no settings; keys that are new since then have their defaults."""
    config = load_run_config(copied)
    now = flat_settings({**config.model_dump(), "deepspeed": {}})
    older = {key: value for key, value in now.items() if key not in ("train.skip_spikes", "model.norm_width")}
    assert changed_settings(older, now) == []
    (change,) = changed_settings(older, {**now, "train.skip_spikes": 5.0, "model.norm_width": 0.3})
    assert str(change) == "train.skip_spikes 0.0 → 5.0"
