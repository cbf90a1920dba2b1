"""Exponential moving average of the weights, beside an engine that may have sharded them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydrazero.trainer.distributed import rank, ranks
from hydrazero.trainer.trained_model import PREFIX

AVERAGE_NAME = "average.safetensors"
"""In a checkpoint: averaged weights by the names that the model gives them."""


class WeightAverage:
    """Average of all trained weights, in float32 at least.

    Under ZeRO 0 to 2 every rank holds all weights and averages all of them; under ZeRO 3 each averages its own part.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay, self.steps = engine, decay, 0
        self.sharded = engine.zero_optimization_stage() == 3
        self.parameters: dict[str, Any] = {
            name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad
        }
        self.parts = {name: _wide(self._part(parameter)) for name, parameter in self.parameters.items()}

    def _part(self, parameter: Any) -> Tensor:
        """What this rank holds of a parameter."""
        part: Tensor = parameter.ds_tensor if self.sharded else parameter
        return part.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step; the first ones count more, so that the start is soon forgotten."""
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self.parameters.items():
            part = self.parts[name]
            part.lerp_(self._part(parameter).to(part.dtype), 1.0 - keep)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the engine's module have the averaged weights for a while; under ZeRO 3 every rank must do so."""
        before = {name: self._part(parameter).clone() for name, parameter in self.parameters.items()}
        self._write(self.parts)
        try:
            yield
        finally:
            self._write(before)

    def whole(self) -> dict[str, Tensor]:
        """Return the averaged weights in full; under ZeRO 3 every rank must ask."""
        return {name: self._joined(self.parts[name], parameter) for name, parameter in self.parameters.items()}

    def _joined(self, part: Tensor, parameter: Any) -> Tensor:
        """Return all ranks' parts of a parameter in its shape."""
        if not self.sharded:
            return part
        joined = part.new_empty(ranks() * part.numel())
        if ranks() > 1:
            dist.all_gather_into_tensor(joined, part.reshape(-1))
        else:
            joined.copy_(part.reshape(-1))
        shape = parameter.ds_shape
        return joined[: shape.numel()].view(shape)

    @torch.no_grad()
    def _write(self, parts: dict[str, Tensor]) -> None:
        """Set the weights, this rank's part of each and, of what ZeRO 3 holds whole at the time, the whole too."""
        for name, parameter in self.parameters.items():
            self._part(parameter).copy_(parts[name])
            if self.sharded and parameter.ds_status.name == "AVAILABLE":
                parameter.data.copy_(self._joined(parts[name], parameter))

    def save(self, folder: Path) -> None:
        """Write the whole average into a checkpoint's folder; called on every rank."""
        whole = self.whole()
        if rank() == 0:
            named = {name.removeprefix(PREFIX): value.contiguous().cpu() for name, value in whole.items()}
            save_file(named, str(folder / AVERAGE_NAME), metadata={"steps": str(self.steps)})

    def load(self, folder: Path, steps: int) -> None:
        """Go on from the average in a checkpoint's folder, which has taken in so many steps."""
        self.steps = steps
        stored = load_file(str(folder / AVERAGE_NAME))
        for name, part in self.parts.items():
            value = stored[name.removeprefix(PREFIX)].to(part.dtype)
            if self.sharded:
                flat = torch.zeros(ranks() * part.numel(), dtype=part.dtype)
                flat[: value.numel()] = value.reshape(-1)
                value = flat[rank() * part.numel() : (rank() + 1) * part.numel()].view_as(part)
            part.copy_(value)


def _wide(values: Tensor) -> Tensor:
    wide = torch.float32 if values.dtype in (torch.bfloat16, torch.float16) else values.dtype
    return values.detach().to(wide, copy=True)
