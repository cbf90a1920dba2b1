"""The launcher's wait for its ranks: one that does not end does not keep the command waiting for ever."""

from __future__ import annotations

import sys
import time

from hydrazero.trainer.ranks import launcher
from hydrazero.trainer.ranks.exit_status import MAY_PASS
from hydrazero.trainer.ranks.launcher import Ranks

STUCK = "import os, time; time.sleep(600) if os.environ['RANK'] == '1' else os._exit({})"
"""A program whose rank 1 does not end, while rank 0 ends with a status."""


def wait_for(status: int, capfd, **options):
    began = time.monotonic()
    with Ranks([sys.executable, "-c", STUCK.format(status)], 2) as running:
        outcome = running.wait(**options)
    assert time.monotonic() - began < 60
    return outcome, capfd.readouterr().err


def test_a_rank_that_does_not_end_after_the_work_is_done_is_killed(monkeypatch, capfd):
    monkeypatch.setattr(launcher, "END", 0.5)
    outcome, said = wait_for(0, capfd, end_together=True)
    assert outcome.status == 0 and said.startswith("warning: rank 1 had finished, but its process did not end")


def test_a_rank_that_waits_for_one_that_has_failed_is_killed(monkeypatch, capfd):
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    outcome, _ = wait_for(70, capfd, end_together=True)
    assert outcome.status == MAY_PASS and outcome.reason == "rank 0 ended with exit status 70"
