"""What users see of a run: log, TensorBoard, Weights & Biases, dry run, profile."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rank_processes import TRAIN, finished_ranks, without_launcher
from rich.console import Console
from run_files import write_small_run
from sources import make_shards, metals, molecules
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hydrazero.launch.cli.main import main
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.cost import run_memory
from hydrazero.trainer.records import progress_line
from hydrazero.trainer.records.progress_line import ProgressLine
from hydrazero.trainer.records.run_files import read_metrics
from hydrazero.trainer.records.run_record import git_commit
from hydrazero.trainer.records.scalar_log import check_wandb


def write_run(folder: Path, data: Path, **metals: str) -> Path:
    tasks = [{"name": "molecules", "shards": f"{data}/molecules"}]
    tasks += [{"name": "metals", "shards": f"{data}/metals", "weight": 2.0, **metals}]
    train = {"steps": 6, "evaluate_every": 3, "checkpoint_every": 6, "log_every": 2}
    return write_small_run(folder, data, tasks=tasks, data={"temperature": 2.0, "workers": 0}, train=train)


def train(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seeing")
    make_shards(root, "molecules", molecules(80))
    make_shards(root, "metals", metals(40))
    return root


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("finished")
    result = train(write_run(folder, data))
    assert result.exit_code == 0, result.output
    return folder / "run", result


def test_tensorboard_holds_all_of_a_run(finished):
    run, _ = finished
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    rates = (
        "loss",
        "learning_rate",
        "gradient_norm",
        "structures_per_s",
        "atoms_per_s",
        "data_wait_share",
        "memory_mb",
    )
    wanted = {f"train/{name}" for name in rates} | {"val/loss", "cosines/molecules-metals"}
    for key in ("weights", "sampling_shares", "gradient_norms", "val/force_mae_mev_per_angstrom", "train/energy_loss"):
        wanted |= {f"{key}/molecules", f"{key}/metals"}
    assert wanted <= scalars
    rows = read_metrics(run)
    measured = {row["step"]: row["cosines"][0][1] for row in rows if row["kind"] == "balance"}
    assert {e.step: pytest.approx(e.value) for e in events.Scalars("cosines/molecules-metals")} == measured
    assert set(events.Tags()["images"]) == {"parity/molecules", "parity/metals"}
    assert [event.step for event in events.Images("parity/metals")] == [3, 6]
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in events.Images("parity/metals"))
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert b"balance.method" in plugin.content and b"gradnorm" in plugin.content
    assert [path.suffix for path in (run / "tensorboard").iterdir() if path.is_dir()] == []  # no second run


def test_shares_and_weights_are_logged_side_by_side(finished):
    rows = [row for row in read_metrics(finished[0]) if row["kind"] == "train"]
    for row in rows:
        drawn = {name: task["structures"] for name, task in row["tasks"].items()}
        assert row["sampling_shares"] == pytest.approx({n: k / sum(drawn.values()) for n, k in drawn.items()})
        assert row["memory_mb"] > 50 and set(row["weights"]) == set(drawn)
    assert rows[0]["weights"] == {"molecules": 1.0, "metals": 2.0}


def test_a_record_names_the_data_and_the_commit(finished, data):
    record = json.loads((finished[0] / "run.json").read_text())
    for task in ("molecules", "metals"):
        assert record["manifests"][task] == hashlib.sha256((data / task / "manifest.json").read_bytes()).hexdigest()
    assert "git" in record


def test_the_commit_of_a_work_tree(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None

    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@y")
        return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert git_commit() is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "x")
    (tmp_path / "untracked").write_text("1")
    assert git_commit() == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "file").write_text("2")
    assert git_commit()["changed"]
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_without_a_terminal_progress_is_lines(finished):
    lines = [line for line in finished[1].stderr.splitlines() if line.startswith("step ") and "structures/s" in line]
    assert re.fullmatch(r"step 2/6: \d+ structures/s, waits \d+%, loss [\d.e-]+, \d:\d\d:\d\d left", lines[0])
    assert len(lines) == 2 and lines[-1].startswith("step 6/6: ")  # the first at once, the last whenever it is
    assert "\r" not in finished[1].stderr and "\x1b" not in finished[1].stderr


def test_a_terminal_of_80_columns_shows_everything(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: clock[0])
    out = StringIO()
    line = ProgressLine(Console(file=out, width=80, force_terminal=True), 0, 1_200_000)
    line.advance(1, 1.0)
    assert line.left() is None
    clock[0] = 5.0
    line.advance(11, 0.012345)
    assert line.left() == pytest.approx(0.5 * (1_200_000 - 11))
    line.interval(12345.6, 0.123)
    line.stop()
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert "12346 structures/s, waits 12%, loss 0.01235" in last and "166:39:54 left" in last and "…" not in last
    assert "11/1200000" in last and len(last) <= 80


FAKE_WANDB = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls.jsonl")

def note(call, **what):
    with open(calls, "a") as file:
        file.write(json.dumps([call, what]) + "\\n")

class Image:
    def __init__(self, pixels):
        self.shape = pixels.shape

class Run:
    def define_metric(self, name, step_metric=None):
        note("define", name=name, step_metric=step_metric)

    def log(self, values):
        note("log", **{key: list(value.shape) if isinstance(value, Image) else value for key, value in values.items()})

    def finish(self):
        note("finish")

def init(**given):
    note("init", **given)
    if given["project"] == "refused":
        raise RuntimeError("no\\nlogin")
    return Run()
"""


def test_weights_and_biases_gets_the_same(data, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = write_run(tmp_path, data)
    result = train(run, "--set", "run.wandb=atoms", "--set", "train.steps=3", "--set", "train.log_every=1")
    monkeypatch.delitem(sys.modules, "wandb")
    assert result.exit_code == 0, result.output
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    (init,) = [what for name, what in calls if name == "init"]
    assert init["project"] == "atoms" and init["config"]["train.steps"] == 3 and init["resume"] == "allow"
    logged: dict[str, Any] = {}
    for name, what in calls:
        if name == "log":
            logged |= {(what["step"], tag): value for tag, value in what.items()}
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [logged[row["step"], "train/loss"] for row in rows] == [row["loss"] for row in rows]
    assert logged[3, "parity/metals"][2] == 3 and calls[-1][0] == "finish"
    result = train(run, "--set", "run.wandb=refused", "--set", f"run.out={tmp_path / 'other'}")
    monkeypatch.delitem(sys.modules, "wandb")
    assert result.exit_code == 1 and "could not be started (no login)" in result.stderr


def test_weights_and_biases_absent_is_said(data, tmp_path, monkeypatch):
    config = load_run_config(write_run(tmp_path, data), ["run.wandb=atoms"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed.*hydrazero\[wandb\]"):
        check_wandb(config.run.wandb)


def test_a_dry_run_writes_nothing(data, tmp_path):
    run = write_run(tmp_path, data)
    before = files_of(tmp_path)
    result = train(run, "--dry-run")
    assert result.exit_code == 0, result.output
    assert files_of(tmp_path) == before
    out = result.stdout
    assert "the run can start; nothing was written" in out and "energy, forces, stress" in out
    assert re.search(r"a step +[\d.]+ s", out) and re.search(r"the whole run +about 0:\d\d:\d\d for 6 steps", out)
    fill = re.search(r"filled +(\d+)% of the structures, (\d+)% of the atoms, (\d+)% of the slots", out)
    assert all(10 < int(share) <= 100 for share in fill.groups())
    assert re.search(r"memory of a rank +about [\d.]+ MB in a step", out)


def test_a_dry_run_of_two_ranks(data, tmp_path):
    run = write_run(tmp_path, data)
    statuses, output = finished_ranks([TRAIN, run, "--dry-run", "--set=deepspeed.config=zero3"], 2)
    assert statuses == [0, 0], output
    assert output.count("the run can start") == 1 and "ZeRO 3" in output
    command = [Path(sys.executable).with_name("hydrazero"), "train", run, "--ranks", "2", "--dry-run"]
    command += ["--set=deepspeed.optimizer.params.lr=1e30", "--set=deepspeed.gradient_clipping=0.0"]
    result = subprocess.run(command, env=without_launcher(), capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1 and result.stderr.count("Error: ") == 1 and "not finite" in result.stderr, result
    assert not (tmp_path / "run").exists()


def test_a_run_too_large_for_the_memory_is_told_what_fits(data, tmp_path, monkeypatch):
    run = write_run(tmp_path, data)
    wide = ("--dry-run", "--set", "batch.atoms=4800", "--set", "batch.slots=153600")
    monkeypatch.setattr(run_memory, "memory_at_hand", lambda ranks: 40_000_000)
    result = train(run, *wide)
    assert result.exit_code == 1
    found = re.search(r"structures = (\d+), atoms = (\d+), slots = (\d+), edges = 0 would fit", result.stderr)
    fitting = [f"batch.{name}={n}" for name, n in zip(("structures", "atoms", "slots"), found.groups(), strict=True)]
    assert train(run, "--dry-run", *(word for one in fitting for word in ("--set", one))).exit_code == 0
    monkeypatch.setattr(run_memory, "memory_at_hand", lambda ranks: 100_000)
    result = train(run, *wide)
    assert result.exit_code == 1 and "no batch that holds the largest structure would fit" in result.stderr


def test_faults_end_a_dry_run_with_a_sentence(data, tmp_path):
    run = write_run(tmp_path, data)
    result = train(run, "--dry-run", "--set", "batch.atoms=5")
    assert result.exit_code == 1 and "set batch.atoms to at least 6" in result.stderr
    changes = ("deepspeed.optimizer.params.lr=1e30", "deepspeed.gradient_clipping=0.0")
    result = train(run, "--dry-run", *(word for change in changes for word in ("--set", change)))
    assert result.exit_code == 1 and "not finite" in result.stderr and ".extxyz#" in result.stderr
    blind = write_run(tmp_path / "blind", data, forces="none")
    result = train(blind, "--dry-run", "--set", "loss.energy_weight=0", "--set", "loss.stress_weight=0")
    assert result.exit_code == 1 and "task 'metals' trains nothing" in result.stderr


def test_a_profile_leaves_the_run_as_it_is(finished):
    run, _ = finished
    before = files_of(run)
    result = train(run.parent / "run.toml", "--profile")
    assert result.exit_code == 0, result.output
    after = files_of(run)
    assert set(after) - set(before) == {"profile/trace-rank0.json"}
    assert all(after[name] == content for name, content in before.items())
    names = [event.get("name", "") for event in json.loads(after["profile/trace-rank0.json"])["traceEvents"]]
    assert any("aten::" in name for name in names)
    rows = [line for line in result.stdout.splitlines() if line.rstrip().endswith("%")]
    shares = [float(line.split()[-1].rstrip("%")) for line in rows]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100
    assert "trace-rank0.json" in result.stdout and np.isfinite(shares).all()


def test_compiled_steps_are_profiled_as_the_run_does_them(data, tmp_path, monkeypatch):
    """Traced, but not compiled, which would take a minute; gradients of the tasks are measured in the third step."""
    monkeypatch.setattr("torch.compile", lambda graph, **_: graph)
    monkeypatch.setattr("hydrazero.trainer.engine.model_with_loss.use_kernels", lambda model: "left out by a test")
    result = train(write_run(tmp_path, data), "--profile", "--set", "train.compile=true")
    assert result.exit_code == 0, result.output
    assert "each step is one graph" in result.stderr and "the 10 most expensive operations" in result.stdout
