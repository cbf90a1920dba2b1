"""Runs that are killed, stopped, moved to other ranks, or find their checkpoints damaged or their disk full."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rank_processes import run_ranks, without_launcher
from test_stream import what_is_left
from torture import differences, kill_once, make_data, train, write_run

from hydrazero.launch.cli.main import main
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.stream.stream import SplitReader, StreamSettings
from hydrazero.trainer import loop
from hydrazero.trainer.checkpoint.folders import (
    PART,
    best_checkpoint,
    checkpoints,
    folder_of,
    latest_checkpoint,
    step_of,
)
from hydrazero.trainer.checkpoint.model_of_run import model_of_run
from hydrazero.trainer.checkpoint.save_load import read_state
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.ranks import stop_signals as stop_request
from hydrazero.trainer.ranks.distributed import lost_contact
from hydrazero.trainer.ranks.exit_status import MAY_PASS
from hydrazero.trainer.ranks.launcher import outcome_of
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.run_files import read_metrics

ranks_start = pytest.mark.ranks
BIN = Path(sys.executable).parent
STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("recovery"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run of two ranks that is never interrupted."""
    run_file = write_run(tmp_path_factory.mktemp("whole"), data, STEPS)
    train(run_file)
    return run_file.parent / "run"


def in_process(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["train", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


@ranks_start
def test_killed_runs_end_as_if_they_had_not_been(data, whole, tmp_path):
    """One rank killed in a checkpoint, whereupon the other must end by itself; all in a step; one under a launcher."""
    run_file, generator = write_run(tmp_path, data, STEPS), random.Random(3)
    for aim, one in (("checkpoint", True), ("step", False)):
        kill_once(run_file, aim, one, generator)
    command = [str(BIN / "hydrazero"), "train", str(run_file), "--ranks", "2", "--resume", "--retries", "1"]
    output_of = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=without_launcher(), **output_of)
    try:
        until = time.monotonic() + 120
        while len(resumes(tmp_path / "run")) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        before = len(read_metrics(tmp_path / "run"))
        while len(read_metrics(tmp_path / "run")) <= before and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(child_of_rank(process.pid, 1), signal.SIGKILL)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "rank 1 was killed by SIGKILL" in output and "(retry 1 of 1)" in output
    assert "Traceback" not in output and "lost" not in output
    assert differences(tmp_path / "run", whole) == []
    assert len(resumes(tmp_path / "run")) == 3
    # The last two stay, and the best.
    best = json.loads((whole / "checkpoints" / "best.json").read_text())["step"]
    assert {step_of(folder) for folder in checkpoints(whole)} == {best, *sorted(wrote(whole, best))[-2:]}
    assert best_checkpoint(whole) == folder_of(whole, best)
    assert min((row["loss"], row["step"]) for row in rows(whole, "evaluation"))[1] == best


def resumes(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "run.json").read_text())["resumes"]


def wrote(run: Path, best: int) -> set[int]:
    """Steps of which a run wrote checkpoints: every five, at the end, and whenever the validation was best so far."""
    steps, lowest = {STEPS, *range(5, STEPS + 1, 5)}, float("inf")
    for row in rows(run, "evaluation"):
        if row["loss"] < lowest:
            lowest = row["loss"]
            steps.add(row["step"])
    return steps


def child_of_rank(parent: int, rank: int) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (found,) = [pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()]
    return int(found)


def test_errors_of_users_are_not_tried_again():
    assert outcome_of([], set()).status == 0
    assert outcome_of([(0, MAY_PASS), (1, 1)], set()).status == 1
    killed = outcome_of([(2, MAY_PASS), (1, -signal.SIGKILL), (0, -signal.SIGKILL)], {0})
    assert killed.status == MAY_PASS and killed.reason.startswith("rank 1 was killed by SIGKILL")
    assert outcome_of([(0, MAY_PASS), (1, 70)], set()).reason == "rank 1 ended with exit status 70"
    assert outcome_of([(0, MAY_PASS), (1, -9)], {1}).reason == "rank 1 did not answer for train.timeout_minutes"


def test_what_a_lost_rank_raises_becomes_a_sentence():
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    assert "another rank, which has ended" in str(lost_contact(closed))
    late = RuntimeError("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv")
    assert "does not answer" in str(lost_contact(late))
    ended = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "data-loading worker" in str(lost_contact(ended))
    assert lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_contact(ValueError("gloo")) is None


@ranks_start
def test_other_ranks_stages_and_precisions_lose_nothing(tmp_path):
    """Handed through engines that cut it in other ways, a checkpoint stays the same to the bit, and losses go on."""
    results = []
    for ranks in (2, 1):
        out = tmp_path / f"{ranks}.json"
        run_ranks("layout_ranks.py", ranks, [str(tmp_path), str(out)])
        results.append(json.loads(out.read_text()))
    expected = results[0]["losses"]
    for result in results:
        assert result["after"] and not any(result["differing"].values()), result["differing"]
        for name, losses in result["after"].items():
            assert losses == pytest.approx(expected, rel=1e-5), name


@ranks_start
def test_data_go_on_exactly_once_with_another_number_of_ranks(data, whole, tmp_path):
    """From two ranks under ZeRO 1 to one without ZeRO, in the middle of an epoch."""
    run_file = write_run(tmp_path, data, STEPS)
    shutil.copytree(whole, tmp_path / "run")
    for folder in checkpoints(tmp_path / "run")[:-2]:
        shutil.rmtree(folder)
    first, last = checkpoints(tmp_path / "run")
    (last / "run_state.pt").write_bytes(b"damaged")
    changes = ("data.workers=2", "deepspeed.gradient_accumulation_steps=2", "deepspeed.zero_optimization.stage=0")
    result = in_process(run_file, "--resume", *(f"--set={change}" for change in changes))
    assert f"{last / 'run_state.pt'} is damaged: its checksum differs" in result.stderr
    assert f"{last.name} is renamed to {last.name}.damaged" in result.stderr
    now_and_then = "1 ranks, ZeRO 0, float32; before, the run had 2 ranks, ZeRO 1, float32"
    assert f"resumed from step {step_of(first)} with {now_and_then}." in result.stderr
    (resumed,) = json.loads((tmp_path / "run" / "run.json").read_text())["resumes"]
    assert (resumed["step"], resumed["ranks"]) == (step_of(first), 1)
    now, before = rows(tmp_path / "run"), rows(whole)
    assert [row["step"] for row in now] == [row["step"] for row in before]
    assert [row["learning_rate"] for row in now] == pytest.approx([row["learning_rate"] for row in before])
    kept = sum(row["step"] <= step_of(first) for row in now)
    assert [row["loss"] for row in now[:kept]] == [row["loss"] for row in before[:kept]]
    drawn = sum(task["structures"] for row in now for task in row["tasks"].values())
    state = read_state(latest_checkpoint(tmp_path / "run"))["stream"]
    shape = BatchShape(structures=8, atoms=48, slots=1536)
    stream = StreamSettings(folders=(f"{data}/molecules", f"{data}/metals"), cutoff=4.0, shape=shape)
    plans = SplitReader(stream, "train").plans()
    epochs = 1 + max(lane["epoch"] for rank in map(json.loads, state["ranks"]) for lane in rank["lanes"])
    left = len(what_is_left(plans, (1, 2), state))
    assert drawn + left == epochs * sum(plan.structures for plan in plans)


def test_requests_to_stop_leave_a_checkpoint_from_which_all_goes_on(data, tmp_path, monkeypatch):
    """By the clock after step 1, by SIGUSR1 in step 4, by Ctrl-C in step 6, by SIGTERM in step 8, to all processes."""
    changes = ("--set=train.steps=10", "--set=train.checkpoint_every=100")
    in_process(write_run(tmp_path / "whole", data, 10), *changes)
    run_file = write_run(tmp_path / "stopped", data, 10)
    result = in_process(run_file, *changes, "--set=train.max_hours=1e-9")
    assert "stopped after step 1: train.max_hours = 1e-09; --resume continues from here" in result.stderr
    run = tmp_path / "stopped" / "run"
    for number, during in ((signal.SIGUSR1, 4), (signal.SIGINT, 6), (signal.SIGTERM, 8)):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "train_step", sending(number, during - step_of(latest_checkpoint(run))))
            result = in_process(run_file, *changes, "--resume")
        assert f"stopped after step {during + 1}: {number.name}" in result.stderr
        assert f"stopped at step {during + 1} of 10" in result.stdout
        assert step_of(latest_checkpoint(run)) == during + 1
    in_process(run_file, *changes, "--resume")
    assert differences(run, tmp_path / "whole" / "run") == []


def test_who_presses_ctrl_c_twice_does_not_wait(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stop_request.time, "monotonic", lambda: now[0])
    with StopRequest(0.0) as stop:
        for _ in range(2):  # from the terminal and from the process that has started this one
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted()
        now[0] += 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def sending(number: int, call: int) -> Callable[..., Any]:
    """A training step that is sent a signal in its `call`th call, as are the processes that read data."""
    step, calls = loop.train_step, []

    def signalled(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            readers = multiprocessing.active_children()
            assert readers
            # Not by this process itself, which its readers obey.
            to = [str(process.pid) for process in [*readers, multiprocessing.current_process()]]
            subprocess.run(["kill", f"-{number:d}", *to], check=True)
        return step(*arguments, **named)

    return signalled


def test_a_run_that_gets_no_better_stops(data, tmp_path):
    """Without a learning rate no evaluation is better than the first, at step 7."""
    changes = ("deepspeed.optimizer.params.lr=0.0", "train.patience=1")
    result = in_process(write_run(tmp_path, data, 30), *(f"--set={change}" for change in changes))
    assert "stopped after step 14: no evaluation of the last 1 has a lower validation loss" in result.stderr
    assert step_of(latest_checkpoint(tmp_path / "run")) == 14 and step_of(best_checkpoint(tmp_path / "run")) == 7


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(data, tmp_path, monkeypatch):
    """A real one, of 8 MB in memory, that is filled up before the second checkpoint and emptied before the third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a file system")
    saved: list[list[int]] = []
    save = loop.save_checkpoint

    def with_little_room(*arguments: Any) -> str | None:
        if len(saved) == 1:
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 50_000))
        elif len(saved) == 2:
            (disk / "filler").unlink()
        reason = save(*arguments)
        saved.append([step_of(folder) for folder in checkpoints(disk / "run")])
        return reason

    monkeypatch.setattr(loop, "save_checkpoint", with_little_room)
    try:
        changes = ("train.evaluate_every=100", "train.keep_checkpoints=1", "train.log_every=1", "data.workers=0")
        result = in_process(write_run(disk, data, 15), *(f"--set={change}" for change in changes))
        assert saved == [[5], [5], [15]], saved
        assert result.stderr.count("the checkpoint of step 10 could not be written (") == 1, result.stderr
        assert (
            "the run continues, and the last complete checkpoint is kept" in result.stderr
            and "Traceback" not in result.output
        )
        assert [row["step"] for row in rows(disk / "run")] == list(range(1, 16))
        assert not list((disk / "run" / "checkpoints").glob(f"*{PART}"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_without_its_last_checkpoint_is_no_success(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "save_checkpoint", lambda *arguments: "No space left on device")
    run_file = write_run(tmp_path, data, 3)
    result = CliRunner().invoke(main, ["train", str(run_file)])
    assert result.exit_code == 1 and "trained:" not in result.output
    assert "Error: the checkpoint of step 3 could not be written (No space left on device)" in result.stderr


def test_damaged_weights_are_not_used(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = best_checkpoint(run) / "average.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for command in (["evaluate", str(run)], ["export", str(run), "--out", str(tmp_path / "model.safetensors")]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and f"{file} is damaged: its checksum differs" in result.output, result.output
    shutil.rmtree(file.parent)
    result = CliRunner().invoke(main, ["evaluate", str(run)])
    assert result.exit_code == 1 and "use the checkpoint 'last'" in result.output


def test_an_average_that_is_kept_from_a_resume_on_begins_with_the_weights_of_then(data, tmp_path):
    run_file = write_run(tmp_path, data, 5)
    in_process(run_file, "--set=train.average=0.0")
    in_process(run_file, "--resume", "--set=train.average=0.9", "--set=train.steps=6")
    before, plain, average = (
        model_of_run(tmp_path / "run", step, averaged=averaged).state_dict()
        for step, averaged in (("5", False), ("6", False), ("6", True))
    )
    for name, value in average.items():
        torch.testing.assert_close(value, torch.lerp(before[name], plain[name], 9 / 11))


def test_the_time_of_earlier_tries_counts():
    assert not StopRequest(1.0, used_hours=0.9).wanted()
    assert StopRequest(1.0, used_hours=1.1).wanted()


def test_a_spike_changes_no_weight(data, tmp_path, monkeypatch):
    """The step is skipped and counted, its structures are named, and the run goes on."""
    states: list[dict[str, torch.Tensor]] = []
    step = loop.train_step

    def watched(engine: Any, *arguments: Any, **named: Any) -> Any:
        states.append({name: p.detach().clone() for name, p in engine.module.named_parameters()})
        return step(engine, *arguments, **named)

    monkeypatch.setattr(loop, "train_step", watched)
    monkeypatch.setattr(StepGuard, "is_spike", lambda guard, loss: len(states) == 3)
    result = in_process(write_run(tmp_path, data, 6), "--set=train.skip_spikes=5.0", "--set=train.log_every=1")
    assert "far above that of the steps before" in result.stderr and ".extxyz#" in result.stderr
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]
    assert changed == [True, True, False, True, True]
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]
