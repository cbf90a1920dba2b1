"""Memory and traffic of a plan compared with real ranks of DeepSpeed with gloo under every ZeRO stage."""

from __future__ import annotations

import json

import pytest
from rank_processes import run_ranks

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
STAGES = ("zero0", "zero1", "zero2", "zero3")


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_and_send_what_is_planned(ranks, tmp_path):
    """Peak memory agrees within 20%; on several ranks, the bytes of each kind of collective agree within 5%."""
    run_ranks("memory_ranks.py", ranks, [str(tmp_path / "found.json"), "384", "512", *STAGES])
    measured = json.loads((tmp_path / "found.json").read_text())
    assert tuple(measured) == STAGES
    for name, found in measured.items():
        assert found["planned"] == pytest.approx(found["peak"], rel=0.2), name
        if ranks == 1:
            assert found["planned_sent"] == {}, name
            continue
        counted = {kind: sum(of for call, of in found["sent"].items() if call.startswith(kind)) for kind in KINDS}
        assert sum(counted.values()) == sum(found["sent"].values()), name  # nothing else is sent
        assert found["planned_sent"] == pytest.approx({kind: of for kind, of in counted.items() if of}, rel=0.05), name
