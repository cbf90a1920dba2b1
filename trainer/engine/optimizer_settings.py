"""Settings of the optimizer and its schedule at a resume: a checkpoint restores its own, whatever the JSON says now."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from hydrazero.trainer.engine.schedules import Schedule
from hydrazero.trainer.engine.training_engine import TrainingEngine

PARAMS, SCHEDULE, CLIPPING = "deepspeed.optimizer.params.", "deepspeed.scheduler.params.", "deepspeed.gradient_clipping"
RATE = f"{PARAMS}lr"

GroupSettings = list[dict[str, Any]]
"""Settings of each of an optimizer's groups of parameters."""


def group_settings(engine: TrainingEngine) -> GroupSettings:
    """Return the settings of the optimizer's groups, as the DeepSpeed JSON has them before a checkpoint is loaded."""
    groups = engine.optimizer.param_groups
    return [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in groups]


def apply_settings(engine: TrainingEngine, configured: GroupSettings, changed: Collection[str]) -> None:
    """Give the engine the values of the changed keys, after a checkpoint has restored the values before the change.

    `configured` is the result of `group_settings`. Called on every rank.
    """
    groups = engine.optimizer.param_groups
    for key in (key.removeprefix(PARAMS) for key in changed if key.startswith(PARAMS)):
        for group, own in zip(groups, configured, strict=True):
            if key in own:
                group[key] = own[key]
    if any(key == RATE or key.startswith(SCHEDULE) for key in changed) and engine.lr_scheduler is not None:
        for group, rate in zip(groups, engine.lr_scheduler.get_lr(), strict=True):
            group["lr"] = rate
    if CLIPPING in changed and hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()


def forget_plateau(engine: TrainingEngine, *, best: bool) -> None:
    """Let a schedule that counts evaluations without a lower validation loss start to count anew.

    With `best`, it also forgets the lowest loss. The learning rate stays at what it has reached.
    """
    if isinstance(engine.lr_scheduler, Schedule):
        engine.lr_scheduler.count_anew(best=best)
