"""Every ZeRO stage on two ranks with different tasks gives the losses and weights of plain PyTorch on one."""

from __future__ import annotations

import json

import pytest
import torch
import zero_ranks
from rank_processes import run_ranks
from structures import small_model

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def plain() -> dict:
    """The same steps in plain PyTorch: all micro-batches of both ranks summed, one AdamW."""
    model = small_model(tasks=zero_ranks.TASKS, dtype=torch.float32).train()
    goal = zero_ranks.objective(model)
    settings = dict(zero_ranks.OPTIMIZER)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    batches = [batch for rank in (0, 1) for batch in zero_ranks.micro_batches(rank, torch.float32)]
    counts = torch.stack([goal.counts(batch) for batch in batches]).sum(0)
    losses = []
    for _ in range(zero_ranks.STEPS):
        optimizer.zero_grad()
        loss = sum(goal.total(goal.sums(model(batch), batch), counts) for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), zero_ranks.CLIP)
        optimizer.step()
        losses.append(float(loss))
    weights = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
    return {"losses": losses, "weights": weights}


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("zero") / "result.json"
    run_ranks("zero_ranks.py", 2, [str(out)])
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "1 compiled", "2 compiled"])
def test_equal_to_plain_pytorch(stage, by_stage, plain):
    assert by_stage[stage]["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert len(set(plain["losses"])) == zero_ranks.STEPS  # the steps did something
    for name, expected in plain["weights"].items():
        torch.testing.assert_close(
            torch.tensor(by_stage[stage]["weights"][name]), torch.tensor(expected), rtol=1e-3, atol=2e-5, msg=name
        )
