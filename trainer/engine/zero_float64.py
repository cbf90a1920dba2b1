"""DeepSpeed's ZeRO in float64, for which DeepSpeed has no setting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hydrazero.trainer.engine.training_engine import TrainingEngine


@contextlib.contextmanager
def float64_zero() -> Iterator[None]:
    """Make ZeRO use float64 for master weights, sums of gradients and communication in engines made in this context.

    Without it, ZeRO would step a float64 model in float32 without a warning. The functions by which DeepSpeed chooses
    these types are replaced while an engine is made. Their names are private, so `tests/ranks/test_zero.py` compares
    each stage with plain PyTorch in float64, to tolerances that float32 would exceed.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine

    answers: list[tuple[type, str, Any]] = [
        (ZeROOptimizer, "_configure_master_weights", lambda *_, **__: torch.float64),
        (DeepSpeedEngine, "get_data_types", lambda _: (torch.float64, torch.float64)),
        (DeepSpeedEngine, "communication_data_type", torch.float64),
    ]
    before = [vars(kind)[name] for kind, name, _ in answers]
    for kind, name, answer in answers:
        setattr(kind, name, answer)
    try:
        yield
    finally:
        for (kind, name, _), old in zip(answers, before, strict=True):
            setattr(kind, name, old)


def finish_float64_zero(engine: TrainingEngine) -> None:
    """Mark the master weights of an engine made in float64 as not of low precision.

    DeepSpeed treats all master weights as such that are not float32.
    """
    engine.optimizer.low_precision_master_weights_and_grads = False
