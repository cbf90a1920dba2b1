"""The launcher of ranks: the threads that it gives them; one that does not end does not keep the command waiting."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from hydrazero.trainer.ranks import launcher
from hydrazero.trainer.ranks.exit_status import MAY_PASS
from hydrazero.trainer.ranks.launcher import Ranks
from hydrazero.trainer.train import use_threads

STUCK = "import os, time; time.sleep(600) if os.environ['RANK'] == '{}' else os._exit({})"
"""A program of which one rank does not end, while the other ends with a status."""


def wait_for(stuck: int, status: int, capfd, **options):
    began = time.monotonic()
    with Ranks([sys.executable, "-c", STUCK.format(stuck, status)], 2) as running:
        outcome = running.wait(**options)
    assert time.monotonic() - began < 60
    return outcome, capfd.readouterr().err


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_that_does_not_end_after_the_work_is_done_is_killed(stuck, monkeypatch, capfd):
    monkeypatch.setattr(launcher, "END", 0.5)
    outcome, said = wait_for(stuck, 0, capfd, end_together=True)
    assert outcome.status == 0 and said.startswith(f"warning: rank {stuck} had finished, but its process did not end")


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_that_waits_for_one_that_has_failed_is_killed(stuck, monkeypatch, capfd):
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    outcome, _ = wait_for(stuck, 70, capfd, end_together=True)
    assert outcome.status == MAY_PASS and outcome.reason == f"rank {1 - stuck} ended with exit status 70"


@pytest.mark.parametrize("variable, threads, expected", [(None, None, "2"), ("5", None, "5"), ("5", 3, "3")])
def test_ranks_get_the_threads_that_are_asked_for(variable, threads, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    command = [sys.executable, "-c", "import os; os.write(1, f'{os.environ[\"OMP_NUM_THREADS\"]}\\n'.encode())"]
    with (tmp_path / "out").open("wb") as output, Ranks(command, 2, output, threads=threads) as two:
        assert two.wait().status == 0
    assert Path(tmp_path / "out").read_text().split() == [expected] * 2


def test_a_rank_in_this_process_uses_the_threads_that_are_asked_for(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    use_threads(None)
    use_threads(3)
    assert asked == [3]
