"""The DeepSpeed engine around the model, and one training step on it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.graph import GraphBatch
from hydrazero.trainer.distributed import gather_objects, ranks, sum_over_ranks
from hydrazero.trainer.trained_model import TrainedModel

WARMUP_SCHEDULES = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


class NonFiniteLossError(HydrazeroError):
    """The loss of a step is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, summed over all ranks and micro-batches."""

    loss: float
    sums: Tensor
    """Of the objective, [tasks, columns] float64."""
    losses: Tensor
    """Of each task, its weight left aside, [tasks] float64; NaN where the step held none of its labels."""
    atoms: int


def make_engine(model: TrainedModel, config: dict[str, Any]) -> Any:
    """Wrap a model in a DeepSpeed engine; `config` is the content of a DeepSpeed JSON.

    Raises ConfigError if DeepSpeed cannot use it.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, DeepSpeedConfigError) as error:
        # What it raises depends on the key; a validation error of pydantic (a ValueError) goes over several lines.
        reason = " ".join(line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line)
        raise ConfigError(
            f"DeepSpeed cannot use its configuration: {reason.rstrip('.')}; see the run file's [deepspeed]."
        ) from error
    _start_schedule(engine)
    return engine


def _start_schedule(engine: Any) -> None:
    """Let a warm-up be at its first step in the first step: DeepSpeed's would take that one with a rate of 0."""
    scheduler = engine.lr_scheduler
    if type(scheduler).__name__ in WARMUP_SCHEDULES and scheduler.last_batch_iteration == -1:
        scheduler.step(1)


@contextlib.contextmanager
def whole_parameters(engine: Any) -> Iterator[None]:
    """Hold every parameter whole: ZeRO-3 drops them after the forward, and second derivatives need them again."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield


def train_step(engine: Any, batches: Sequence[GraphBatch], step: int) -> StepResult:
    """Do one optimizer step on as many micro-batches as the engine accumulates.

    Raises NonFiniteLossError on every rank, before any weight changes, if the loss is not finite on one of them.
    """
    tasks = len(engine.module.model.tasks)
    objective = engine.module.objective
    counts = sum_over_ranks(torch.stack([objective.counts(batch) for batch in batches]).sum(0))
    # DeepSpeed averages gradients over ranks and micro-batches; the loss is a sum over both.
    share = ranks() * len(batches)
    total = torch.zeros((), dtype=torch.float64, device=counts.device)
    table: Tensor | None = None
    atoms = torch.stack([batch.atom_mask.sum() for batch in batches]).sum().to(torch.float64)
    for number, batch in enumerate(batches):
        loss, sums = engine(batch, counts)
        total = total + loss.detach()
        table = sums if table is None else table + sums
        if number == len(batches) - 1:
            everything = sum_over_ranks(torch.cat([table.reshape(-1), total.view(1), atoms.view(1)]))
            _stop_unless_finite(everything, batches, total, step)
        with whole_parameters(engine):
            engine.backward(loss * share)
        engine.step()
    norm = engine.get_global_grad_norm()
    if engine.skipped_steps or (norm is not None and not math.isfinite(norm)):
        raise NonFiniteLossError(
            f"the gradient of step {step} is not finite although its loss is; go on from the last checkpoint with a "
            "lower learning rate, or look for atoms that nearly coincide."
        )
    sums = everything[:-2].view(tasks, -1)
    losses = torch.where(counts.sum(1) > 0, objective.by_task(sums, counts), float("nan"))
    return StepResult(loss=float(everything[-2]), sums=sums, losses=losses.cpu(), atoms=int(everything[-1]))


def _stop_unless_finite(everything: Tensor, batches: Sequence[GraphBatch], local: Tensor, step: int) -> None:
    if torch.isfinite(everything).all():
        return
    mine = [] if torch.isfinite(local) else [name for batch in batches for name in batch.source_ids()]
    names = [name for part in gather_objects(mine) for name in part]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise NonFiniteLossError(
        f"the loss of step {step} is not finite; it came from a batch with the structures {shown}: check their labels, "
        "or lower the learning rate; no weight was changed by this step."
    )
