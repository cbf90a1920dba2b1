"""The DeepSpeed engine around the model, and one training step on it."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.config.precision import for_deepspeed, precision_of, use_tf32
from hydrazero.trainer.config.schedule_shapes import own_shape
from hydrazero.trainer.engine.parameter_groups import parameter_groups
from hydrazero.trainer.engine.schedules import Schedule
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.training_step import PREFIX, TrainedModel
from hydrazero.trainer.engine.zero_float64 import finish_float64_zero, float64_zero
from hydrazero.trainer.ranks.distributed import gather_objects, ranks, sum_over_ranks

DEFAULT_RATE = 1e-3
"""Of DeepSpeed's optimizers."""
ONE_RATE = ("WarmupLR", "WarmupDecayLR", "LRRangeTest", "OneCycle")
"""Schedules that set the same learning rate for every group of parameters."""
WARMUP_SCHEDULES = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, summed over all ranks and micro-batches."""

    loss: float
    sums: Tensor
    """Of the objective, [tasks, columns] float64."""
    losses: Tensor
    """Of each task, its weight left aside, [tasks] float64; NaN where the step held no label of it or was skipped."""
    atoms: int
    skipped: bool
    """Whether no weight was changed."""
    rescaled: bool
    """Whether it was skipped only for the scale of the loss, which was too large for fp16 and is smaller now."""
    suspects: list[str]
    """Of a step that was skipped: structures of batches whose loss was not finite, or all if each was."""
    stop: bool
    """Whether a rank wants to stop."""


def make_engine(model: TrainedModel, config: dict[str, Any], factors: Mapping[str, float] | None = None) -> Any:
    """Wrap a model in a DeepSpeed engine, in the precision of `config`, the content of a DeepSpeed JSON.

    `factors` are learning rates over the configured one, by the names of the model's parameters; 1 for others.

    Raises ConfigError if DeepSpeed cannot use it.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    precision = precision_of(config)
    shape = own_shape(config)
    config = for_deepspeed(config, precision)
    if shape is not None:
        del config["scheduler"]
    model.to(precision.weights)
    model.model.autocast = precision.encoder
    use_tf32(precision)
    wide = precision.weights == torch.float64
    rates = _rates(config, factors or {})
    if config.get("zero_optimization", {}).get("stage") == 3:
        # All parameters in one gather for each batch: DeepSpeed would fetch them module by module, and those that the
        # differentiation inside the forward has dropped once more, one by one.
        deepspeed.utils.set_z3_leaf_modules(model, [TrainedModel])
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
    try:
        with float64_zero() if wide else contextlib.nullcontext():
            engine, _, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=parameter_groups(model, rates),
                config=config,
                lr_scheduler=None if shape is None else lambda optimizer: Schedule(optimizer, shape),
            )
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, DeepSpeedConfigError) as error:
        # What it raises depends on the key; a validation error of pydantic (a ValueError) goes over several lines.
        reason = " ".join(line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line)
        raise ConfigError(
            f"DeepSpeed cannot use its configuration: {reason.rstrip('.')}; see the run file's [deepspeed]."
        ) from error
    if wide:
        finish_float64_zero(engine)
    scaler = loss_scaler(engine)
    if scaler is not None:
        scaler.raise_error_at_min_scale = False  # the step is skipped, and counted by the guard
    _start_schedule(engine)
    return engine


def _rates(config: dict[str, Any], factors: Mapping[str, float]) -> dict[str, float]:
    """Return the learning rates that are not the configured one; raises ConfigError if the schedule has one for all."""
    if all(factor == 1.0 for factor in factors.values()):
        return {}
    schedule = config.get("scheduler", {}).get("type", "WarmupCosineLR")
    if schedule in ONE_RATE:
        raise ConfigError(
            f"finetune.method = 'layerwise' needs a schedule that keeps the rates of layers apart, and {schedule} sets "
            "one for all; choose WarmupCosineLR, WarmupStableDecayLR or WarmupPlateauLR under [deepspeed.scheduler]."
        )
    rate = config["optimizer"].get("params", {}).get("lr", DEFAULT_RATE)
    return {PREFIX + name: factor * rate for name, factor in factors.items() if factor != 1.0}


def _start_schedule(engine: Any) -> None:
    """Let a warm-up be at its first step in the first step: DeepSpeed's would take that one with a rate of 0."""
    scheduler = engine.lr_scheduler
    if type(scheduler).__name__ in WARMUP_SCHEDULES and scheduler.last_batch_iteration == -1:
        scheduler.step(1)


def loss_scaler(engine: Any) -> Any | None:
    """Return what finds the scale of the loss in fp16, None where it has no scale or a fixed one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if engine.fp16_enabled() and getattr(scaler, "dynamic", False) else None


@contextlib.contextmanager
def whole_parameters(engine: Any) -> Iterator[None]:
    """Hold every parameter whole: ZeRO-3 drops them after the forward, and second derivatives need them again."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield


def train_step(engine: Any, batches: Sequence[GraphBatch], guard: StepGuard, *, stop: bool) -> StepResult:
    """Do one optimizer step on as many micro-batches as the engine accumulates.

    Skipped, on all ranks and without a change of any weight, if the loss is a spike, or if it or its gradient is not
    finite on one of them.
    """
    tasks = len(engine.module.model.tasks)
    objective = engine.module.objective
    counts = sum_over_ranks(torch.stack([objective.counts(batch) for batch in batches]).sum(0))
    # DeepSpeed averages gradients over ranks and micro-batches; the loss is a sum over both.
    factor = float(ranks() * len(batches))
    total = torch.zeros((), dtype=torch.float64, device=counts.device)
    table: Tensor | None = None
    atoms = torch.stack([batch.atom_mask.sum() for batch in batches]).sum().to(torch.float64)
    skipped_before = engine.skipped_steps
    scaler = loss_scaler(engine)
    can_rescale = scaler is not None and scaler.cur_scale > scaler.min_scale
    for number, batch in enumerate(batches):
        loss, sums = engine(batch, counts)
        total = total + loss.detach()
        table = sums if table is None else table + sums
        if number == len(batches) - 1:
            wanted = total.new_tensor([float(stop)])
            everything = sum_over_ranks(torch.cat([table.reshape(-1), total.view(1), atoms.view(1), wanted]))
            if guard.is_spike(float(everything[-3])):
                factor = math.nan  # the engine skips steps whose gradients are not finite, in every ZeRO stage
        with whole_parameters(engine):
            engine.backward(loss * factor)
        _step_unless_broken(engine)
    sums = everything[:-3].view(tasks, -1)
    skipped = engine.skipped_steps > skipped_before
    losses = torch.where(counts.sum(1) > 0, objective.by_task(sums, counts), math.nan)
    return StepResult(
        loss=float(everything[-3]),
        sums=sums,
        losses=torch.full_like(losses, math.nan).cpu() if skipped else losses.cpu(),
        atoms=int(everything[-2]),
        skipped=skipped,
        rescaled=skipped and can_rescale and math.isfinite(float(everything[-3])) and math.isfinite(factor),
        suspects=_suspects(batches, total, float(everything[-3])) if skipped else [],
        stop=bool(everything[-1]),
    )


def _step_unless_broken(engine: Any) -> None:
    """Let the engine step; without ZeRO, nothing in it looks whether gradients are finite before it does."""
    if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        if not torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all():
            engine.zero_grad()
            engine.skipped_steps += 1
            engine.global_steps += 1
            engine.micro_steps += 1
            return
    skipped_before = engine.skipped_steps
    engine.step()
    if engine.skipped_steps > skipped_before and engine.zero_optimization_stage() in (1, 2):
        # With offload, DeepSpeed would add the next step's gradients to those that it skipped.
        held = getattr(engine.optimizer, "averaged_gradients", {})
        held.update(dict.fromkeys(held))


def _suspects(batches: Sequence[GraphBatch], local: Tensor, loss: float) -> list[str]:
    """Names of the structures of every rank whose own part of the loss is not finite, of all ranks if the loss is."""
    innocent = bool(torch.isfinite(local)) and not math.isfinite(loss)
    mine = [] if innocent else [name for batch in batches for name in batch.source_ids()]
    return [name for part in gather_objects(mine) for name in part]
