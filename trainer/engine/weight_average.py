"""Exponential moving average of the weights, for an engine that may partition them over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydrazero.trainer.engine.model_with_loss import PREFIX
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.zero_layout import layout_of
from hydrazero.trainer.ranks.distributed import rank

AVERAGE_NAME = "average.safetensors"
"""File in a checkpoint: averaged weights by their names in the model."""


class WeightAverage:
    """Average of all trained weights, in float32 at least.

    Each rank averages the master weights that it steps: the average of bf16 weights would not change where a step
    changes it by less than their rounding.
    """

    def __init__(self, engine: TrainingEngine, decay: float) -> None:
        self.layout, self.decay = layout_of(engine), decay
        self.parameters: dict[str, Any] = {
            name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad
        }
        self.start_here()

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights after a step; the first steps count more, so that the start is soon forgotten."""
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for part, weights in zip(self.parts, self.layout.master_weights(), strict=True):
            part.lerp_(weights.detach(), 1.0 - keep)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the engine's module the averaged weights within a `with` block; called on every rank."""
        try:
            with self._as_master_weights():
                self.layout.update_model()
                yield
        finally:
            self.layout.update_model()

    @contextlib.contextmanager
    def _as_master_weights(self) -> Iterator[None]:
        """Put the average in the place of the master weights within a `with` block."""
        before = [weights.detach().clone() for weights in self.layout.master_weights()]
        self._set(self.parts)
        try:
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for weights, value in zip(self.layout.master_weights(), values, strict=True):
            weights.copy_(value)

    def full(self) -> dict[str, Tensor]:
        """Return the averaged weights in full, by their names in the engine; called on every rank."""
        with self._as_master_weights():
            return {name: self.layout.full_weight(parameter) for name, parameter in self.parameters.items()}

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint's folder; called on every rank."""
        full = self.full()
        if rank() == 0:
            named = {name.removeprefix(PREFIX): value.contiguous().cpu() for name, value in full.items()}
            save_file(named, str(folder / AVERAGE_NAME), metadata={"steps": str(self.steps)})

    def start_here(self) -> None:
        """Start the average with the weights as they are now."""
        self.steps, self.parts = 0, [weights.detach().clone() for weights in self.layout.master_weights()]

    def load(self, folder: Path, steps: int) -> None:
        """Continue the average in a checkpoint's folder, which includes the weights after `steps` steps."""
        self.steps = steps
        stored = load_file(str(folder / AVERAGE_NAME))
        with self._as_master_weights():
            for name, parameter in self.parameters.items():
                self.layout.set_full_weight(parameter, stored[name.removeprefix(PREFIX)])
            self.parts = [weights.detach().clone() for weights in self.layout.master_weights()]
