"""Time per step of PyTorch DDP and of each ZeRO stage on the same batch, alternately, and bytes of collectives."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "ranks", "support"))
from collective_count import Collectives
from ours import batch_of, model_of
from timing import hand_over
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hydrazero.models.ops.compiled import use_kernels
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.engine.parameter_groups import parameter_groups
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.exit_status import exit_rank

STAGES = (0, 1, 2, 3)
TASKS, STRUCTURES = 4, 64
STEPS = 3
"""Number of consecutive steps per side. The first is not counted, since the caches hold another side's memory."""


def trained_model() -> ModelWithLoss:
    model = model_of(TASKS).train()
    if reason := use_kernels(model):
        raise SystemExit(f"the kernels are missing: {reason}")
    return ModelWithLoss(model, make_objective(model, LossSection(), [1.0] * TASKS))


def ddp_step() -> Callable[[], None]:
    """Return a step in PyTorch that does what the engine's does: sums over ranks, mean gradients, clipping, AdamW."""
    trained = trained_model()
    model, batch = DistributedDataParallel(trained), batch_of("benzene", TASKS, STRUCTURES)
    config = deepspeed_config({"config": "zero0"}, steps=1000)
    params = {key: value for key, value in config["optimizer"]["params"].items() if key != "torch_adam"}
    optimizer = torch.optim.AdamW(parameter_groups(trained), **params)

    def step() -> None:
        counts = distributed.sum_over_ranks(trained.objective.counts(batch))
        loss, sums = model(batch, counts)
        distributed.sum_over_ranks(torch.cat([sums.reshape(-1), loss.detach().view(1)]))
        (loss * distributed.ranks()).backward()
        norm = nn.utils.clip_grad_norm_(trained.parameters(), config["gradient_clipping"])
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()

    return step


def zero_step(stage: int) -> Callable[[], None]:
    from hydrazero.trainer.engine.engine import make_engine, train_step

    engine = make_engine(trained_model(), deepspeed_config({"config": f"zero{stage}"}, steps=1000))
    batch, guard = batch_of("benzene", TASKS, STRUCTURES), StepGuard(10, 0.0)

    def step() -> None:
        train_step(engine, [batch], guard, stop=False)

    return step


def main() -> None:
    rounds, only = int(sys.argv[1]), sys.argv[2:]
    counter = Collectives()  # before DeepSpeed imports the functions of torch.distributed
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    distributed.start_ranks()
    makers: dict[str, Callable[[], Callable[[], None]]] = {"ddp": ddp_step}
    makers |= {f"zero{stage}": lambda stage=stage: zero_step(stage) for stage in STAGES}
    sides = {name: make() for name, make in makers.items() if not only or name in only}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    sent: dict[str, list[float]] = {}
    # DDP sends its gradients from C++, where they cannot be counted.
    unseen = {"ddp": sum(4 * p.numel() for p in model_of(TASKS).parameters())}
    for step in sides.values():
        for _ in range(3):  # ZeRO 3 records in its first steps when it needs each parameter
            step()
    gc.freeze()
    for _ in range(rounds):
        for name, step in sides.items():
            for number in range(STEPS):
                distributed.wait_for_all()
                counter.reset()
                began = time.perf_counter()
                step()
                took = time.perf_counter() - began
                sent[f"{name}_bytes"] = [float(sum(counter.bytes.values()) + unseen.get(name, 0))]
                if number:
                    seconds[name].append(distributed.max_over_ranks(took))
    if distributed.rank() == 0:
        hand_over({**seconds, **sent})
    distributed.wait_for_all()
    exit_rank(0)


if __name__ == "__main__":
    main()
