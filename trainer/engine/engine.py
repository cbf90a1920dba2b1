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
from hydrazero.trainer.engine.model_with_loss import PREFIX, ModelWithLoss
from hydrazero.trainer.engine.parameter_groups import parameter_groups
from hydrazero.trainer.engine.schedules import Schedule
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.zero_float64 import finish_float64_zero, float64_zero
from hydrazero.trainer.engine.zero_layout import layout_of
from hydrazero.trainer.ranks.distributed import gather_objects, ranks, sum_over_ranks

DEFAULT_RATE = 1e-3
"""Learning rate of DeepSpeed's optimizers where a configuration names none."""
ONE_RATE = ("WarmupLR", "WarmupDecayLR", "LRRangeTest", "OneCycle")
"""Schedules that set the same learning rate for every group of parameters."""
WARMUP_SCHEDULES = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
"""DeepSpeed's schedules whose first rate is 0."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of a step, summed over all ranks and micro-batches."""

    loss: float
    """Weighted mean of the tasks' losses."""
    sums: Tensor
    """The objective's sums, [tasks, columns] float64."""
    losses: Tensor
    """Loss of each task without its weight, [tasks] float64; NaN for tasks without labels, and in a skipped step."""
    atoms: int
    """Number of atoms, without padding."""
    skipped: bool
    """Whether no weight was changed."""
    rescaled: bool
    """Whether it was skipped only because the scale of the loss was too large for fp16; it is smaller now."""
    suspects: list[str]
    """Structures of a skipped step that may be its cause: those of batches whose loss was not finite, or else all."""
    stop: bool
    """Whether a rank has been asked to stop."""


def make_engine(
    model: ModelWithLoss, config: dict[str, Any], factors: Mapping[str, float] | None = None
) -> TrainingEngine:
    """Return a DeepSpeed engine for a model, in the precision of `config`, the content of a DeepSpeed JSON.

    `factors` are learning rates divided by the configured one, by the names of the model's parameters; the factor of
    the other parameters is 1. Raises ConfigError if DeepSpeed cannot use the configuration.
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
        # All parameters are gathered at once for each batch. Otherwise DeepSpeed would gather them module by module,
        # and once more, one by one, those that the differentiation inside the forward pass has released.
        deepspeed.utils.set_z3_leaf_modules(model, [ModelWithLoss])
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
        # The type of the error depends on the key; a validation error of pydantic (a ValueError) has several lines.
        reason = " ".join(line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line)
        raise ConfigError(
            f"DeepSpeed cannot use its configuration: {reason.rstrip('.')}; see the run file's [deepspeed]."
        ) from error
    if wide:
        finish_float64_zero(engine)
    scaler = layout_of(engine).loss_scaler()
    if scaler is not None:
        scaler.raise_error_at_min_scale = False  # the step is skipped, and counted by the guard
    _start_schedule(engine)
    made: TrainingEngine = engine
    return made


def _rates(config: dict[str, Any], factors: Mapping[str, float]) -> dict[str, float]:
    """Return the learning rates that differ from the configured one.

    Raises ConfigError if there are any while the schedule sets one rate for all.
    """
    if all(factor == 1.0 for factor in factors.values()):
        return {}
    schedule = config.get("scheduler", {}).get("type", "WarmupCosineLR")
    if schedule in ONE_RATE:
        raise ConfigError(
            f"finetune.method = 'layerwise' needs a schedule with a learning rate for each layer, and {schedule} has "
            "only one; choose WarmupCosineLR, WarmupStableDecayLR or WarmupPlateauLR under [deepspeed.scheduler]."
        )
    rate = config["optimizer"].get("params", {}).get("lr", DEFAULT_RATE)
    return {PREFIX + name: factor * rate for name, factor in factors.items() if factor != 1.0}


def _start_schedule(engine: TrainingEngine) -> None:
    """Put a warm-up at its first step: with DeepSpeed's schedules, the first step would have a learning rate of 0."""
    scheduler = engine.lr_scheduler
    if type(scheduler).__name__ in WARMUP_SCHEDULES and scheduler.last_batch_iteration == -1:
        scheduler.step(1)


@contextlib.contextmanager
def gathered_parameters(engine: TrainingEngine) -> Iterator[None]:
    """Keep all parameters gathered: ZeRO 3 releases them after the forward pass, and second derivatives need them."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield


def train_step(engine: TrainingEngine, batches: Sequence[GraphBatch], guard: StepGuard, *, stop: bool) -> StepResult:
    """Do one optimizer step on as many micro-batches as the engine accumulates; called on every rank.

    The step is skipped on all ranks, without a change of any weight, if the loss is a spike, or if the loss or its
    gradient is not finite on one of them. `stop` says that this rank has been asked to stop.
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
    layout = layout_of(engine)
    scaler = layout.loss_scaler()
    takes_gradients = engine.module.compiles_steps and len(batches) == 1 and layout.takes_gradients()
    can_rescale = scaler is not None and scaler.cur_scale > scaler.min_scale
    for number, batch in enumerate(batches):
        found = engine.module.loss_with_gradients(batch, counts) if takes_gradients else None
        loss, sums = engine(batch, counts) if found is None else (found.loss, found.sums)
        total = total + loss.detach()
        table = sums if table is None else table + sums
        if number == len(batches) - 1:
            stops = total.new_tensor([float(stop)])
            everything = sum_over_ranks(torch.cat([table.reshape(-1), total.view(1), atoms.view(1), stops]))
            if guard.is_spike(float(everything[-3])):
                factor = math.nan  # the engine skips steps whose gradients are not finite, in every ZeRO stage
        if found is not None:
            layout.take_gradients(found.gradients, factor)
            found.gradients.clear()  # they are not held beside the engine's copies during its step
        else:
            with gathered_parameters(engine):
                engine.backward(loss * factor)
        _step_if_finite(engine)
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


def _step_if_finite(engine: TrainingEngine) -> None:
    """Do the engine's step; without ZeRO, the engine does not check that gradients are finite, so it is done here."""
    if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        largest = [torch.linalg.vector_norm(gradient, math.inf) for gradient in gradients]  # NaN if one element is
        if not torch.isfinite(torch.stack(largest)).all():
            engine.zero_grad()
            engine.skipped_steps += 1
            engine.global_steps += 1
            engine.micro_steps += 1
            return
    skipped_before = engine.skipped_steps
    engine.step()
    if engine.skipped_steps > skipped_before:
        layout_of(engine).discard_gradients()


def _suspects(batches: Sequence[GraphBatch], local: Tensor, loss: float) -> list[str]:
    """Return the structures of all ranks whose own part of the loss is not finite, or of all if the loss is finite."""
    is_innocent = bool(torch.isfinite(local)) and not math.isfinite(loss)
    mine = [] if is_innocent else [name for batch in batches for name in batch.source_ids()]
    return [name for part in gather_objects(mine) for name in part]
