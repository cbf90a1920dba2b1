"""Folders in which one process writes: a second one is refused, with the host and the process of the first."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rank_processes import TRAIN, finished_ranks
from run_files import write_small_run
from sources import make_shards, metals, molecules

from hydrazero.launch.cli.main import main
from hydrazero.shards import files
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer import loop
from hydrazero.trainer.records import run_lock
from hydrazero.trainer.records.run_lock import RUN_LOCK, folder_in_use

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("locked")
    make_shards(root, "molecules", molecules(60))
    make_shards(root, "metals", metals(20))
    return root


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT", 0.0)


def write_run(folder: Path, data: Path, workers: int = 0) -> Path:
    train = {"steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "log_every": 1}
    return write_small_run(folder, data, train=train, data={"workers": workers})


@contextmanager
def held_elsewhere(folder: Path, name: str = RUN_LOCK) -> Iterator[int]:
    """Another process holds the lock of a folder."""
    ready = FORK.Event()

    def hold() -> None:
        with folder_in_use(folder, name, "run folder"):
            ready.set()
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    try:
        assert ready.wait(20) and process.pid
        yield process.pid
    finally:
        process.kill()
        process.join()


def refused(said: str, pid: int, folder: Path) -> bool:
    return f"{folder} is in use by process {pid} on host {socket.gethostname()} since 20" in said


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != RUN_LOCK}


def test_a_living_run_is_not_resumed_by_another_process(data, tmp_path):
    file, run = write_run(tmp_path, data), tmp_path / "run"
    with held_elsewhere(run) as pid:
        started = CliRunner().invoke(main, ["train", str(file)])
        assert started.exit_code == 1 and refused(started.stderr, pid, run)
    assert CliRunner().invoke(main, ["train", str(file)]).exit_code == 0  # the lock of a killed process is free
    before = snapshot(run)
    with held_elsewhere(run) as pid:
        resumed = CliRunner().invoke(main, ["train", str(file), "--resume", "--set=train.steps=6"])
        assert resumed.exit_code == 1 and resumed.stderr.startswith("Error: ") and refused(resumed.stderr, pid, run)
        # What does not write there is not concerned, nor is an evaluation of a run in progress.
        for words in (["train", file, "--dry-run", "--resume"], ["evaluate", run], ["report", run]):
            result = CliRunner().invoke(main, [str(word) for word in words])
            assert result.exit_code == 0, result.output
    assert all(snapshot(run)[path] == content for path, content in before.items())
    resumed = CliRunner().invoke(main, ["train", str(file), "--resume", "--set=train.steps=6"])
    assert resumed.exit_code == 0 and not (run / RUN_LOCK).exists()


def test_the_run_itself_holds_the_lock(data, tmp_path, monkeypatch):
    """Also while its data workers, which are forked from it, are alive."""
    file, run = write_run(tmp_path, data, workers=1), tmp_path / "run"
    step: Callable[..., Any] = loop.train_step
    seen = []

    def looking(*arguments: Any, **options: Any) -> Any:
        seen.append((files.try_lock(run / RUN_LOCK), files.lock_holder(run / RUN_LOCK)))
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", looking)
    assert CliRunner().invoke(main, ["train", str(file)]).exit_code == 0
    assert len(seen) == 4 and all(lock is None for lock, _ in seen)
    assert all(who.startswith(f"process {os.getpid()} on host ") for _, who in seen)


@pytest.mark.ranks
def test_all_ranks_are_refused_together(data, tmp_path):
    file = write_run(tmp_path, data)
    with held_elsewhere(tmp_path / "run") as pid:
        statuses, output = finished_ranks([TRAIN, file], 2)
    assert statuses == [1, 1] and output.count("Error: ") == 1 and refused(output, pid, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_second_evaluation_into_the_same_folder_is_refused(data, tmp_path):
    file, run = write_run(tmp_path, data), tmp_path / "run"
    assert CliRunner().invoke(main, ["train", str(file)]).exit_code == 0
    with held_elsewhere(run, ".evaluation.json.lock") as pid:
        result = CliRunner().invoke(main, ["evaluate", str(run)])
        assert result.exit_code == 1 and refused(result.stderr, pid, run)
        assert not (run / "evaluation.json").exists()
        assert CliRunner().invoke(main, ["evaluate", str(run), "--out", str(tmp_path / "own")]).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["evaluation.json", "predictions"]


def test_children_of_a_killed_process_do_not_keep_its_lock(tmp_path):
    """As data workers do not, which may outlive a rank for some seconds."""
    pids = FORK.Queue()

    def hold() -> None:
        with folder_in_use(tmp_path, RUN_LOCK, "run folder"):
            child = FORK.Process(target=time.sleep, args=(30,))
            child.start()
            pids.put(child.pid)
            time.sleep(60)

    parent = FORK.Process(target=hold)
    parent.start()
    child = pids.get(timeout=20)
    assert files.try_lock(tmp_path / RUN_LOCK) is None
    parent.kill()
    parent.join()
    try:
        os.kill(child, 0)  # it is alive
        with folder_in_use(tmp_path, RUN_LOCK, "run folder"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_gives_a_warning(data, tmp_path, monkeypatch):
    def without(path: Path) -> None:
        raise files.NoLocksError(f"{path} cannot be locked (Function not implemented)")

    monkeypatch.setattr(run_lock, "try_lock", without)
    result = CliRunner().invoke(main, ["train", str(write_run(tmp_path, data))])
    assert result.exit_code == 0 and "has no locks, so nothing prevents another process" in result.stderr


def test_a_lock_that_is_a_link_leaves_its_target_alone(data, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN_LOCK).symlink_to(precious)
    result = CliRunner().invoke(main, ["train", str(write_run(tmp_path, data))])
    assert result.exit_code == 1 and "cannot be used as a lock" in result.stderr
    assert precious.read_text() == "kept"


def test_a_note_of_somebody_else_is_printed_as_plain_text(tmp_path):
    (tmp_path / "lock").write_bytes(b"\x1b[31mprocess 1\n\xff" + b"x" * 1000)
    shown = files.lock_holder(tmp_path / "lock")
    assert shown.isprintable() and shown.startswith("[31mprocess 1") and len(shown) <= files.LONGEST_NOTE


def test_a_start_that_fails_leaves_no_folder(data, tmp_path):
    file = write_run(tmp_path, data)
    words = ["train", str(file), "--set=deepspeed.zero_optimization.stage=9"]
    assert CliRunner().invoke(main, words).exit_code == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"run folder .* cannot be written \(Not a directory\)"):
        folder_in_use(file / "run", RUN_LOCK, "run folder").__enter__()
    shutil.rmtree(tmp_path)
