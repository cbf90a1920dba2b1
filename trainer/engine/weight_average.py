"""Exponential moving average of the weights, beside an engine that may have sharded them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydrazero.trainer.engine.master_weights import set_whole_weight, spread_weights, stepped_weights, whole_weight
from hydrazero.trainer.engine.training_step import PREFIX
from hydrazero.trainer.ranks.distributed import rank

AVERAGE_NAME = "average.safetensors"
"""In a checkpoint: averaged weights by the names that the model gives them."""


class WeightAverage:
    """Average of all trained weights, in float32 at least.

    Each rank averages what it steps: bf16 weights would not move by changes that are smaller than their rounding.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.parameters: dict[str, Any] = {
            name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad
        }
        self.start_here()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step; the first ones count more, so that the start is soon forgotten."""
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for part, weights in zip(self.parts, stepped_weights(self.engine), strict=True):
            part.lerp_(weights.detach(), 1.0 - keep)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the engine's module have the averaged weights for a while; every rank must do so."""
        try:
            with self._stepped():
                spread_weights(self.engine)
                yield
        finally:
            spread_weights(self.engine)

    @contextlib.contextmanager
    def _stepped(self) -> Iterator[None]:
        """Let what the optimizer steps be the average for a while."""
        before = [weights.detach().clone() for weights in stepped_weights(self.engine)]
        self._set(self.parts)
        try:
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for weights, value in zip(stepped_weights(self.engine), values, strict=True):
            weights.copy_(value)

    def whole(self) -> dict[str, Tensor]:
        """Return the averaged weights in full; every rank must ask."""
        with self._stepped():
            return {name: whole_weight(self.engine, parameter) for name, parameter in self.parameters.items()}

    def save(self, folder: Path) -> None:
        """Write the whole average into a checkpoint's folder; called on every rank."""
        whole = self.whole()
        if rank() == 0:
            named = {name.removeprefix(PREFIX): value.contiguous().cpu() for name, value in whole.items()}
            save_file(named, str(folder / AVERAGE_NAME), metadata={"steps": str(self.steps)})

    def start_here(self) -> None:
        """Begin with the weights as they are now."""
        self.steps, self.parts = 0, [weights.detach().clone() for weights in stepped_weights(self.engine)]

    def load(self, folder: Path, steps: int) -> None:
        """Go on from the average in a checkpoint's folder, which has taken in so many steps."""
        self.steps = steps
        stored = load_file(str(folder / AVERAGE_NAME))
        with self._stepped():
            for name, parameter in self.parameters.items():
                set_whole_weight(self.engine, parameter, stored[name.removeprefix(PREFIX)])
            self.parts = [weights.detach().clone() for weights in stepped_weights(self.engine)]
