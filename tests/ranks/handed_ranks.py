"""Program of each rank in test_handed_gradients.py: steps on traced graphs, with and without DeepSpeed's backward pass.

The graphs are not compiled, which changes nothing in how gradients are handed over.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import zero_ranks
from structures import small_model

from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.exit_status import exit_rank

STEPS = 4
NAMES = ("zero0", "zero1", "zero1_fp64", "zero2")


def train(name: str, *, handed: bool) -> dict:
    """Return losses, norms and weights of steps, of which one is skipped; and how often gradients were handed over."""
    from hydrazero.trainer.engine.engine import make_engine, train_step
    from hydrazero.trainer.engine.zero_layout import layout_of

    config = {**zero_ranks.ds_config(name), "gradient_accumulation_steps": 1}
    dtype = torch.float64 if name.endswith("fp64") else torch.float32
    model = small_model(tasks=zero_ranks.TASKS, dtype=torch.float32, layers=1).to(dtype).train()
    model.unused = torch.nn.Parameter(torch.ones(3, 3, dtype=dtype))  # weight decay changes it, gradients do not
    trained = ModelWithLoss(model, zero_ranks.objective(model))
    engine = make_engine(trained, config)
    trained.compile_steps()
    kind, times = type(layout_of(engine)), 0
    takes, take = kind.takes_gradients, kind.take_gradients

    def counted(layout, gradients, factor) -> None:
        nonlocal times
        times += 1
        take(layout, gradients, factor)

    kind.take_gradients = counted
    if not handed:
        kind.takes_gradients = lambda layout: False
    batch, guard = zero_ranks.micro_batches(distributed.rank(), dtype)[-1], StepGuard(10, 0.0)
    bad = zero_ranks.micro_batches(distributed.rank(), dtype)[-1]
    if distributed.rank() == distributed.ranks() - 1:
        bad.energy = bad.energy * math.nan
    losses, norms = [], []
    for step in range(STEPS):
        result = train_step(engine, [bad if step == 2 else batch], guard, stop=False)
        assert result.skipped == (step == 2)
        losses.append(result.loss)
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    kind.takes_gradients, kind.take_gradients = takes, take
    states = len(getattr(engine.optimizer, "optimizer", engine.optimizer).state)
    counters = [states, engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps]
    return {
        "losses": losses,
        "norms": norms,
        "counters": counters,
        "weights": zero_ranks.flat(dict(trained.named_parameters())),
        "times": times,
    }


def main() -> None:
    torch.compile = lambda graph, **_: graph
    distributed.start_ranks()
    found = {name: [train(name, handed=handed) for handed in (True, False)] for name in NAMES}
    if distributed.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    distributed.wait_for_all()
    exit_rank(0)


if __name__ == "__main__":
    main()
