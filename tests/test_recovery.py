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

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_processes import run_ranks
from test_stream import what_is_left
from torture import differences, kill_once, make_data, train, write_run

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graph import BatchShape
from hydrazero.shards.stream import SplitReader, StreamSettings
from hydrazero.trainer import loop
from hydrazero.trainer.checkpoint import read_state
from hydrazero.trainer.checkpoint_files import (
    PART,
    Kept,
    best_checkpoint,
    checkpoints,
    file_sum,
    finish_checkpoint,
    folder_of,
    latest_checkpoint,
    remove_leftovers,
    step_of,
    usable_checkpoint,
)
from hydrazero.trainer.checkpoint_layout import Layout, Place
from hydrazero.trainer.cli import main
from hydrazero.trainer.distributed import MAY_PASS, lost_contact
from hydrazero.trainer.launcher import outcome_of
from hydrazero.trainer.run_files import MetricsWriter, read_metrics
from hydrazero.trainer.step_guard import SETTLED, NonFiniteLossError, StepGuard

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
    """One rank killed in a checkpoint, whereupon the other must end by itself, and all in or near a step."""
    run_file, generator = write_run(tmp_path, data, STEPS), random.Random(3)
    for aim, one in (("checkpoint", True), ("step", False)):
        kill_once(run_file, aim, one, generator)
    train(run_file)
    assert differences(tmp_path / "run", whole) == []
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["resumes"]) == 2
    # The last two stay, and the best.
    best = json.loads((whole / "checkpoints" / "best.json").read_text())["step"]
    assert {step_of(folder) for folder in checkpoints(whole)} == {best, *sorted(wrote(whole, best))[-2:]}
    assert best_checkpoint(whole) == folder_of(whole, best)
    assert min((row["loss"], row["step"]) for row in rows(whole, "evaluation"))[1] == best


def wrote(run: Path, best: int) -> set[int]:
    """Steps of which a run wrote checkpoints: every five, at the end, and whenever the validation was best so far."""
    steps, lowest = {STEPS, *range(5, STEPS + 1, 5)}, float("inf")
    for row in rows(run, "evaluation"):
        if row["loss"] < lowest:
            lowest = row["loss"]
            steps.add(row["step"])
    return steps


@ranks_start
def test_a_rank_that_dies_is_named_and_the_run_starts_again(data, whole, tmp_path):
    run_file = write_run(tmp_path, data, STEPS)
    command = [str(BIN / "hydrazero"), "train", str(run_file), "--ranks", "2", "--retries", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 120
        while not read_metrics(tmp_path / "run") and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(child_of_rank(process.pid, 1), signal.SIGKILL)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "rank 1 was killed by SIGKILL" in output and "(retry 1 of 1)" in output
    assert "Traceback" not in output and "lost" not in output
    assert differences(tmp_path / "run", whole) == []


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
    assert "reads data" in str(lost_contact(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")))
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
    assert f"{last / 'run_state.pt'} is not what was written" in result.stderr
    assert f"{last.name} is kept as {last.name}.damaged" in result.stderr
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
    epochs = 1 + max(lane["epoch"] for rank in state["ranks"] for lane in rank["lanes"])
    left = len(what_is_left(plans, (1, 2), state))
    assert drawn + left == epochs * sum(plan.structures for plan in plans)


layouts = st.tuples(st.sampled_from([0, 1, 3]), st.integers(1, 5))


@settings(max_examples=100, deadline=None)
@given(layouts, layouts, st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_pieces_cover_each_parameter_once(one, other, sizes):
    """Whatever piece one layout needs, the holders in another have all of it, each number once."""
    now, saved = layout(*one, sizes), layout(*other, sizes)
    for name, place in now.places.items():
        covered = np.zeros(place.size, dtype=int)
        for rank in range(now.ranks if now.stage else 1):
            piece = now.piece(name, rank)
            if piece is None:
                continue
            covered[piece.begin : piece.begin + piece.size] += 1
            found = np.zeros(place.size, dtype=int)
            for holder in saved.holders(name, piece.begin, piece.begin + piece.size):
                part = saved.piece(name, holder)
                assert part is not None
                found[part.begin : part.begin + part.size] += 1
            assert (found[piece.begin : piece.begin + piece.size] == 1).all()
        assert (covered == 1).all()


def layout(stage: int, ranks: int, sizes: list[int]) -> Layout:
    """One flat tensor of all parameters (ZeRO 1), of their parts (ZeRO 3), or one for each (no ZeRO)."""
    lengths = [-(-size // ranks) if stage == 3 else size for size in sizes]
    starts = [sum(lengths[:number]) for number in range(len(sizes))]
    places = {
        str(number): Place(flat=0 if stage else number, start=starts[number] if stage else 0, size=size)
        for number, size in enumerate(sizes)
    }
    shares = (-(-sum(sizes) // ranks),) if stage == 1 else ()
    return Layout(stage=stage, ranks=ranks, precision="float32", places=places, shares=shares)


def test_requests_to_stop_leave_a_checkpoint_from_which_all_goes_on(data, tmp_path, monkeypatch):
    """By the clock after step 1, by SIGUSR1 in step 4, by SIGTERM to all processes in step 7."""
    changes = ("--set=train.steps=10", "--set=train.checkpoint_every=100")
    in_process(write_run(tmp_path / "whole", data, 10), *changes)
    run_file = write_run(tmp_path / "stopped", data, 10)
    result = in_process(run_file, *changes, "--set=train.max_hours=1e-9")
    assert "stopped after step 1: train.max_hours = 1e-09; --resume goes on from here" in result.stderr
    run = tmp_path / "stopped" / "run"
    for number, during in ((signal.SIGUSR1, 4), (signal.SIGTERM, 7)):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "train_step", sending(number, during - step_of(latest_checkpoint(run))))
            result = in_process(run_file, *changes, "--resume")
        assert f"stopped after step {during + 1}: {number.name}" in result.stderr
        assert step_of(latest_checkpoint(run)) == during + 1
    in_process(run_file, *changes, "--resume")
    assert differences(run, tmp_path / "whole" / "run") == []


def sending(number: int, call: int) -> Callable[..., Any]:
    """A training step that is sent a signal in its `call`th call, as are the processes that read data."""
    step, calls = loop.train_step, []

    def signalled(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            readers = multiprocessing.active_children()
            assert readers
            for process in [*readers, multiprocessing.current_process()]:
                os.kill(process.pid, number)
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
        assert "the run goes on, the last complete one stays" in result.stderr and "Traceback" not in result.output
        assert [row["step"] for row in rows(disk / "run")] == list(range(1, 16))
        assert not list((disk / "run" / "checkpoints").glob(f"*{PART}"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_lines_for_which_there_is_no_room_wait(tmp_path):
    """Whole, in their order, and with nothing of a line that was cut short."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]).returncode != 0:
        pytest.skip("this user may not mount a file system")
    try:
        writer = MetricsWriter(disk)
        assert writer.append({"step": 0, "kind": "a"}) is None
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        reasons = [writer.append({"step": step, "kind": "a" * 5000}) for step in (1, 2)]
        assert reasons == ["No space left on device"] * 2
        assert [row["step"] for row in read_metrics(disk)] == [0]
        (disk / "filler").unlink()
        assert writer.append({"step": 3, "kind": "a"}) is None
        assert [row["step"] for row in read_metrics(disk)] == [0, 1, 2, 3]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def made_up(run: Path, step: int, best: tuple[int, float] | None, last: int = 2) -> None:
    """Write a checkpoint of one file."""
    folder = folder_of(run, step)
    part = folder.with_name(folder.name + PART)
    part.mkdir(parents=True)
    (part / "weights").write_text(f"of step {step}")
    kept = Kept(last=last, best=None if best is None else {"step": best[0], "loss": best[1]})
    finish_checkpoint(part, {"weights": file_sum(part / "weights")}, kept)


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    for step, best in ((5, None), (10, (10, 0.4)), (15, (10, 0.4)), (20, (10, 0.4)), (25, (10, 0.4))):
        made_up(tmp_path, step, best)
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [10, 20, 25]
    assert best_checkpoint(tmp_path) == folder_of(tmp_path, 10)
    # Gone back to step 20, what came after it is of another run.
    made_up(tmp_path, 22, (22, 0.3))
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [20, 22]
    assert best_checkpoint(tmp_path) == folder_of(tmp_path, 22)
    for left in ("step-00000030.part", "step-00000010.removed"):
        (tmp_path / "checkpoints" / left).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.json",
        "step-00000020",
        "step-00000022",
    ]


@pytest.mark.parametrize("damage", ["changed", "missing", "sums"])
def test_damaged_checkpoints_are_named_and_left_aside(tmp_path, damage):
    for step in (5, 10, 15):
        made_up(tmp_path, step, None, last=9)

    def harm(step: int) -> None:
        folder = folder_of(tmp_path, step)
        if damage == "changed":
            (folder / "weights").write_text(f"of stop {step}")
        elif damage == "missing":
            (folder / "weights").unlink()
        else:
            (folder / "checksums.json").write_text("{}")

    harm(15)
    harm(10)
    found, said = usable_checkpoint(tmp_path)
    assert found == folder_of(tmp_path, 5) and len(said) == 2
    assert "step-00000015/" in said[0] and "step-00000010/" in said[1]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]
    harm(5)
    for _ in range(2):  # nothing is lost by asking
        with pytest.raises(ConfigError, match=r"every checkpoint of .* is damaged: .*step-00000005/.*step 0"):
            usable_checkpoint(tmp_path)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.02, 1.0), st.floats(1e-6, 1e6))
def test_spikes_are_told_from_noise(seed, noise, size):
    """At six standard deviations nothing of a normal log loss is a spike, and ten are, once the mean has settled."""
    generator, guard = np.random.default_rng(seed), StepGuard(3, 6.0)
    logs = generator.normal(0.0, noise, 3 * SETTLED)
    for number, value in enumerate(logs):
        if number < SETTLED:
            assert not guard.is_spike(size * 1e9)
        assert not guard.is_spike(size * float(np.exp(min(value, 2.5 * noise))))
        guard.done(size * float(np.exp(value)))
    spike = size * float(np.exp(20 * noise))
    assert guard.is_spike(spike) and not guard.is_spike(size * float(np.exp(-20 * noise)))
    other = StepGuard(3, 6.0)
    other.load(guard.state())
    assert other.is_spike(spike) and vars(other) == vars(guard)
    assert "far above those before it" in other.skip(1, spike, ["a#1"]) and "a#1" in other.skip(2, spike, ["a#1"])
    with pytest.raises(NonFiniteLossError, match="3 steps in a row"):
        other.skip(3, spike, [])


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
    assert "far above those before it" in result.stderr and ".extxyz#" in result.stderr
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]
    assert changed == [True, True, False, True, True]
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]
