"""DeepSpeed's ZeRO in float64, which it has no setting for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def float64_zero() -> Iterator[None]:
    """Let ZeRO keep master weights, sums of gradients and what ranks exchange in float64, in engines made meanwhile.

    Left to itself it would step a model of float64 in float32, and say nothing. What it asks of itself when an engine
    is made is answered here; its names for these are private, so `tests/ranks/test_zero.py` holds each stage to plain
    PyTorch in float64, tightly enough to tell.
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


def finish_float64_zero(engine: Any) -> None:
    """Tell the optimizer of an engine made so that its master weights are not of low precision.

    It takes them to be wherever they are not float32.
    """
    engine.optimizer.low_precision_master_weights_and_grads = False
