"""The launcher's wait for its ranks: one that does not end does not keep the command waiting for ever."""

from __future__ import annotations

import sys
import time

import pytest

from hydrazero.trainer.ranks import launcher
from hydrazero.trainer.ranks.exit_status import MAY_PASS
from hydrazero.trainer.ranks.launcher import Ranks

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
