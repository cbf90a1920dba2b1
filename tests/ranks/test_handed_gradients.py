"""Gradients that are handed over without a backward pass give the very same steps as DeepSpeed's backward pass."""

from __future__ import annotations

import json

import handed_ranks
import pytest
from rank_processes import run_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=[1, 2])
def found(request, tmp_path_factory) -> dict[str, list[dict]]:
    path = tmp_path_factory.mktemp("handed") / "result.json"
    run_ranks("handed_ranks.py", request.param, [str(path)], timeout=400)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", handed_ranks.NAMES)
def test_steps_are_the_same(name, found):
    handed, passed_back = found[name]
    assert passed_back.pop("times") == 0
    assert handed.pop("times") == (handed_ranks.STEPS if name in ("zero0", "zero1") else 0)
    assert repr(handed) == repr(passed_back)  # NaN, the loss of a skipped step, is not equal to itself
    assert len(set(map(repr, handed["losses"]))) == handed_ranks.STEPS
