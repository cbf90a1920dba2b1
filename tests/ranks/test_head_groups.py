"""Heads in groups of ranks train as stacked heads on every rank do, with the expected messages and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.head_groups import EVERYWHERE, GROUPS, RANKS
from rank_processes import finished_ranks

STEPS = 5
SCRIPT = Path(__file__).parents[1] / "bench" / "head_groups_rank.py"


@pytest.mark.ranks
def test_groups_train_as_stacked_heads_do():
    """Compare both on four ranks, with large heads and with structures that differ in size."""
    statuses, output = finished_ranks([SCRIPT, STEPS, "large", "unequal"], RANKS)
    assert not any(statuses), output
    handed = next(line for line in output.splitlines() if line.startswith("SECONDS "))
    found = json.loads(handed.removeprefix("SECONDS "))
    for case in ("large", "unequal"):
        losses = found[f"{case}_{EVERYWHERE}_loss"]
        assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0]
        assert found[f"{case}_{GROUPS}_loss"] == pytest.approx(losses, rel=1e-5)
        assert found[f"{case}_shared_difference"][0] < 1e-5 and found[f"{case}_heads_difference"][0] < 1e-5
        shared, heads = found[f"{case}_{EVERYWHERE}_parameters"]
        assert found[f"{case}_{GROUPS}_parameters"] == [shared, heads / 2]
        for side, parameters, tasks in ((EVERYWHERE, shared + heads, 2), (GROUPS, shared + heads / 2, 1)):
            counts_and_loss = 8 * (2 * tasks + 1)  # numbers of energy and force labels per task, and the loss
            assert set(found[f"{case}_{side}_sent"]) == {4 * parameters + counts_and_loss}
            assert set(found[f"{case}_{side}_states"]) == {4 * 4 * parameters}
    assert found[f"large_{EVERYWHERE}_parameters"][1] == pytest.approx(3 * shared, rel=0.01)
