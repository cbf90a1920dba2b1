"""The records of ranks, and the verdicts of the post-mortem."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hydrazero.launch.cli.main import main
from hydrazero.launch.node.rank import rank_in
from hydrazero.launch.node.records import add_event, read_attempt
from hydrazero.launch.postmortem import (
    CANCELLED,
    FAILED,
    FINISHED,
    REFUSED,
    STOPPED,
    RunProgress,
    Verdict,
    judge,
    should_restart,
    wait_for_ends,
)
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.launcher_variables import node_name

HALF = RunProgress(step=20, steps=40)
LOST = ["Error: rank 0 has lost another rank, which has ended; --resume continues from the last checkpoint."]


def start(folder: Path, node: str, *ranks: int, of: int = 2) -> None:
    for rank in ranks:
        add_event(folder, node, "start", rank=rank, ranks=of, local=0, pid=1)


def end(folder: Path, node: str, rank: int, status: int, tail: list[str] | None = None) -> None:
    add_event(folder, node, "end", rank=rank, status=status, tail=tail or [])


def told(folder: Path, node: str, rank: int, name: str) -> None:
    add_event(folder, node, "told", rank=rank, signal=name)


def verdict_of(folder: Path, progress: RunProgress = HALF) -> Verdict:
    return judge(read_attempt(folder), progress)


def test_the_rank_that_was_killed_is_the_first_though_another_recorded_its_end_earlier(tmp_path):
    start(tmp_path, "n1", 0), start(tmp_path, "n2", 1)
    end(tmp_path, "n1", 0, 75, LOST)
    end(tmp_path, "n2", 1, -9, ["step 19", "step 20"])
    verdict = verdict_of(tmp_path)
    assert (verdict.kind, verdict.step) == (FAILED, 20)
    assert verdict.sentence == (
        "rank 1 on n2 was killed by SIGKILL (out of memory?) at step 20 of 40, the first of 2 ranks to fail"
    )
    assert verdict.details[0].startswith("rank 1 on n2, ") and "(Error: rank 0 has lost" in verdict.details[1]
    assert verdict.details[2:] == ("last output of rank 1:", "    step 19", "    step 20")


def test_the_error_of_a_rank_is_reported_and_the_end_by_the_launcher_is_no_cause(tmp_path):
    start(tmp_path, "n1", 0, 1)
    told(tmp_path, "n1", 0, "SIGTERM")
    end(tmp_path, "n1", 0, -15)
    tail = ["Traceback (most recent call last):", '  File "x.py"', "torch.OutOfMemoryError: 3 GiB wanted.", "more"]
    end(tmp_path, "n1", 1, 70, tail)
    verdict = verdict_of(tmp_path)
    assert "rank 1 on n1 ended with exit status 70 (torch.OutOfMemoryError: 3 GiB wanted)" in verdict.sentence
    assert "received SIGTERM" in verdict.details[1]


def test_a_users_error_would_happen_again(tmp_path):
    start(tmp_path, "n1", 0, 1)
    end(tmp_path, "n1", 1, 1)
    end(tmp_path, "n1", 0, 1, ["Error: task 'a' has no shards."])
    verdict = verdict_of(tmp_path, RunProgress(step=0, steps=0))
    assert verdict.kind == REFUSED and "(Error: task 'a' has no shards) before its first step" in verdict.sentence
    assert should_restart([verdict], 9) == (False, "")


def test_a_lost_node_is_the_one_that_was_silent_first(tmp_path):
    start(tmp_path, "n1", 0), start(tmp_path, "n2", 1)
    os.utime(tmp_path / "n2.jsonl", (1, time.time() - 300))
    end(tmp_path, "n1", 0, 75, LOST)
    assert verdict_of(tmp_path).sentence.startswith("rank 1 on n2 was lost with its node")
    silent = tmp_path / "silent"
    silent.mkdir()
    start(silent, "n1", 0), start(silent, "n2", 1)
    assert "all ranks ended at once" in verdict_of(silent).sentence
    os.utime(silent / "n1.jsonl", (1, time.time() - 300))
    assert verdict_of(silent).sentence.startswith("rank 0 on n1 was lost with its node")


@pytest.mark.parametrize("name, kind", [("SIGUSR1", STOPPED), ("SIGTERM", CANCELLED), ("", FINISHED)])
def test_good_ends(tmp_path, name, kind):
    start(tmp_path, "n1", 0, 1)
    for rank in (0, 1):
        if name:
            told(tmp_path, "n1", rank, name)
        end(tmp_path, "n1", rank, 0)
    verdict = verdict_of(tmp_path)
    assert verdict.kind == kind and "at step 20 of 40" in verdict.sentence
    assert verdict_of(tmp_path, RunProgress(step=40, steps=40)).sentence == "finished at step 40 of 40"


def test_other_ends(tmp_path):
    assert "no rank has started" in verdict_of(tmp_path).sentence
    start(tmp_path, "n1", 0, 1, of=4)
    for rank in (0, 1):
        end(tmp_path, "n1", rank, 75)
    assert "ranks 2, 3 never started" in verdict_of(tmp_path).sentence
    start(tmp_path, "n2", 2, 3, of=4)
    for rank in (2, 3):
        end(tmp_path, "n2", rank, 75)
    assert "ranks lost contact with each other" in verdict_of(tmp_path).sentence
    for rank in (2, 3):
        told(tmp_path, "n2", rank, "SIGTERM")
    assert verdict_of(tmp_path).kind == CANCELLED
    with open(tmp_path / "n2.jsonl", "a") as file:
        file.write('{"event": "end", "ra')  # cut off by a full disk
    add_event(tmp_path, "n3", "unfit", reason="torch sees 7 of 8 GPUs")
    assert "nodes failed the check (node n3: torch sees 7 of 8 GPUs)" in verdict_of(tmp_path).sentence


def ends(*kinds_and_steps: tuple[str, int]) -> list[Verdict]:
    return [Verdict(kind=kind, sentence="", details=(), step=step) for kind, step in kinds_and_steps]


def test_a_job_is_restarted_as_long_as_it_makes_progress():
    assert should_restart(ends((STOPPED, 10)), 0)[0] and should_restart(ends((STOPPED, 10), (STOPPED, 20)), 0)[0]
    again, why = should_restart(ends((STOPPED, 10), (STOPPED, 10)), 3)
    assert not again and "request more hours" in why
    assert should_restart(ends((FAILED, 0)), 1)[0] and should_restart(ends((FAILED, 0), (FAILED, 5), (FAILED, 9)), 1)[0]
    again, why = should_restart(ends((FAILED, 5), (FAILED, 5)), 1)
    assert not again and "failed 2 times without a new checkpoint" in why
    assert should_restart(ends((STOPPED, 5), (FAILED, 5)), 1)[0]
    for kind in (FINISHED, CANCELLED, REFUSED):
        assert not should_restart(ends((kind, 5)), 9)[0]


def test_the_command(tmp_path):
    result = CliRunner().invoke(main, ["postmortem", str(tmp_path)])
    assert result.exit_code == 1 and "holds no attempts of a job" in result.output
    attempt = tmp_path / "launch" / "attempt-0001"
    attempt.mkdir(parents=True)
    (attempt / "job.json").write_text('{"job": "17"}')
    start(attempt, "n1", 0, of=1)
    end(attempt, "n1", 0, -11)
    result = CliRunner().invoke(main, ["postmortem", str(tmp_path)])
    assert result.exit_code == 75
    assert result.output.startswith("attempt 1 (job 17): rank 0 on n1 was killed by SIGSEGV before its first step, the")
    assert CliRunner().invoke(main, ["postmortem", str(tmp_path), "--retries", "0"]).exit_code == 1
    (attempt / "n1.jsonl").unlink()  # what has been judged stays
    assert CliRunner().invoke(main, ["postmortem", str(tmp_path)]).output == result.output


def test_ranks_that_outlive_their_launcher_are_waited_for(tmp_path, monkeypatch):
    """Until they have recorded their ends, but not if their node is silent, and not longer than the limit."""
    monkeypatch.setattr("hydrazero.launch.postmortem.LOOK_EVERY", 0.05)
    attempt = tmp_path / "launch" / "attempt-0001"
    attempt.mkdir(parents=True)
    start(attempt, "n1", 0), start(attempt, "n2", 1)
    for rank, node in enumerate(("n1", "n2")):
        told(attempt, node, rank, "SIGUSR1")
    end(attempt, "n1", 0, 0)
    began = time.monotonic()
    wait_for_ends(attempt, 0.3)
    assert 0.3 <= time.monotonic() - began < 5
    timer = threading.Timer(0.5, end, (attempt, "n2", 1, 0))
    timer.start()
    result = CliRunner().invoke(main, ["postmortem", str(tmp_path), "--wait", "60"])
    assert time.monotonic() - began < 30
    assert result.output.startswith("attempt 1: stopped before its first step by SIGUSR1"), result.output
    start(attempt, "n3", 2, of=3)
    os.utime(attempt / "n3.jsonl", (1, time.time() - 300))
    began = time.monotonic()
    wait_for_ends(attempt, 60)
    assert time.monotonic() - began < 5


def watched(attempt: Path, *command: str, options: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[bytes]:
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "SLURMD_NODENAME": "n7"}
    environment = {**os.environ, **place, **variables}
    words = [sys.executable, "-m", "hydrazero.launch.node.rank", f"--attempt={attempt}", *options, *command]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rows(attempt: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (attempt / "n7.jsonl").read_text().splitlines()]


def test_a_watched_rank_records_its_end(tmp_path):
    process = watched(tmp_path, "sh", "-c", "echo rank $RANK of $WORLD_SIZE on $LOCAL_RANK; echo oh >&2; exit 7")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7 and output == b"rank 3 of 4 on 0\noh\n"
    first, last = rows(tmp_path)
    assert (first["event"], first["rank"], first["ranks"], first["node"]) == ("start", 3, 4, "n7")
    assert (last["event"], last["status"], last["tail"]) == ("end", 7, ["rank 3 of 4 on 0", "oh"])


def test_signals_are_forwarded_and_recorded(tmp_path):
    script = "trap 'echo stops; exit 0' USR1; echo ready; while :; do sleep 0.05; done"
    process = watched(tmp_path, "bash", "-c", script)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0 and process.stdout.read() == b"stops\n"
    assert [row.get("signal", row["event"]) for row in rows(tmp_path)] == ["start", "SIGUSR1", "end"]


def test_the_time_of_a_job_and_its_own_end_reach_the_rank(tmp_path):
    trap = "trap 'exit 0' USR1; while :; do sleep 0.05; done"
    process = watched(tmp_path, "bash", "-c", trap, options=("--stop-after", "2"))
    assert process.wait(60) == 0 and rows(tmp_path)[1]["signal"] == "SIGUSR1"
    process = watched(tmp_path, "sh", "-c", "kill -SEGV $$")
    assert process.wait(60) == 128 + signal.SIGSEGV and rows(tmp_path)[-1]["status"] == -signal.SIGSEGV
    says_its_place = ("bash", "-c", "echo $$ $LOCAL_RANK; exec sleep 600")
    process = watched(tmp_path, *says_its_place, options=("--one-device",), LOCAL_RANK="2")
    assert process.stdout is not None
    pid, local_rank = map(int, process.stdout.readline().split())
    assert local_rank == 0
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():  # a zombie has none
        assert time.monotonic() < until, "the rank outlives the one that watches it"
        time.sleep(0.05)


def test_a_rank_continues_where_no_records_can_be_written(tmp_path):
    """The folder does not exist, or it is removed while the rank runs."""
    told = "Warning: the record 'start' of rank 3 on n7 cannot be written to .*absent \\(No such [a-z ]*\\); the rank"
    process = watched(tmp_path / "absent", "sh", "-c", "echo trains", options=("--remove", str(tmp_path / "copies")))
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0 and re.fullmatch(f"{told}[^\n]*\\.\ntrains\n", output), output
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    script = "trap 'echo stops; exit 0' USR1; echo ready; while :; do sleep 0.05; done"
    process = watched(attempt, "bash", "-c", script)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    shutil.rmtree(attempt)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0 and output.count("Warning: ") == 1 and output.endswith("stops\n"), output


def test_the_last_rank_of_a_node_removes_folders_on_its_disk(tmp_path):
    copies, attempt = tmp_path / "copies", tmp_path / "attempt"
    copies.mkdir(), attempt.mkdir()
    options = ("--remove", str(copies))
    start(attempt, "n7", 2, of=4)
    assert watched(attempt, "true", options=options).wait(60) == 0 and copies.exists()
    end(attempt, "n7", 2, 0)
    assert watched(attempt, "true", options=options).wait(60) == 0 and not copies.exists()


def test_a_rank_knows_its_number_from_every_launcher(monkeypatch):
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    place = rank_in(srun)
    assert (place.rank, place.ranks, place.local) == (5, 8, 1)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    assert node_name() == "n2"
    within = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert rank_in({**srun, **within}).rank == 3  # mpirun in a job of Slurm
    assert rank_in({"PMI_RANK": "2", "PMI_SIZE": "24", "PALS_LOCAL_RANKID": "2"}).ranks == 24
    with pytest.raises(ConfigError, match="no launcher has given"):
        rank_in({"SLURM_PROCID": "0"})
