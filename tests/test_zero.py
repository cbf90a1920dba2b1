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
    stays = {name for name, _ in model.named_parameters() if name.endswith(("bias", "elements"))}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in stays]},
        {"params": [p for name, p in model.named_parameters() if name in stays], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **zero_ranks.OPTIMIZER)
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [batch for rank in (0, 1) for batch in zero_ranks.micro_batches(rank, torch.float32)]
    counts = torch.stack([goal.counts(batch) for batch in batches]).sum(0)
    losses = []
    for step in range(zero_ranks.STEPS + 1):
        weights = zero_ranks.flat(model)
        optimizer.zero_grad()
        loss = sum(goal.total(goal.sums(model(batch), batch), counts) for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), zero_ranks.CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        keep = min(zero_ranks.AVERAGE, (2 + step) / (11 + step))
        for name, p in model.named_parameters():
            if step < zero_ranks.STEPS:
                averaged[name] = keep * averaged[name] + (1 - keep) * p.detach()
    flat = {name: value.flatten().tolist() for name, value in averaged.items()}
    return {"losses": losses, "weights": weights, "averaged": flat}


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("zero") / "result.json"
    run_ranks("zero_ranks.py", 2, [str(out)])
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "1 compiled", "2 compiled"])
def test_equal_to_plain_pytorch(stage, by_stage, plain):
    assert by_stage[stage]["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert len(set(plain["losses"])) == zero_ranks.STEPS + 1  # the steps did something
    for kind in ("weights", "averaged"):
        assert plain["weights"] != plain["averaged"]
        for name, expected in plain[kind].items():
            found = torch.tensor(by_stage[stage][kind][name])
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=2e-5, msg=f"{kind}: {name}")
