"""What every way of balancing tasks shares: a weight per task, from what all ranks have seen, the same on each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BalanceSection:
    """How the tasks' losses are weighted against each other; the tasks' own `weight` multiplies what comes out."""

    method: str = "gradnorm"
    """'uniform', 'static', 'uncertainty', 'famo' or 'gradnorm'."""
    every: int = 50
    """Steps between measurements of the tasks' gradients, and between changes of weights that need one; 0: never."""
    smoothing: float = 0.9
    """Of what is measured: the share that is kept of what was known before."""
    alpha: float = 0.0
    """gradnorm: how much more a task is to count that has been learning slowly; at 0 all gradients are equally long,
    below 0 a task counts more the more it has learned (0 was better than 0.5: docs/results/balancing.md)."""
    learning_rate: float = 0.025
    """famo, uncertainty: of the logits of the weights."""
    smallest: float = 0.05
    """Bounds of the weights, whose mean is 1."""
    largest: float = 20.0


@dataclass(frozen=True, kw_only=True)
class BalanceFacts:
    """What is known of T tasks before the first step."""

    structures: tuple[int, ...]
    """Training structures of each."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a step has shown on all ranks together."""

    losses: Tensor
    """[T] float64: each task's loss; NaN where the step held none of its labels."""
    gram: Tensor | None = None
    """[T, T] float64: products of the gradients of the tasks' losses, where they were measured; NaN as above."""


@dataclass(kw_only=True)
class Balancer:
    """Weights of one by default; methods override what they change."""

    settings: BalanceSection
    facts: BalanceFacts
    weights: Tensor = field(init=False)
    """[T] float64, within the bounds, of mean 1."""

    def __post_init__(self) -> None:
        self.weights = torch.ones(len(self.facts.structures), dtype=torch.float64)
        self.start()

    def start(self) -> None:
        """Set what the method holds before the first step."""

    def update(self, step: int, seen: Seen) -> None:
        """Change the weights after a step."""

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain types and tensors."""
        kept = ("settings", "facts")
        return copy.deepcopy({name: value for name, value in vars(self).items() if name not in kept})

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        vars(self).update(copy.deepcopy(state))


def bounded(weights: Tensor, smallest: float, largest: float) -> Tensor:
    """Scale positive weights [T] to mean 1 with all of them within the bounds (smallest <= 1 <= largest).

    Clipping and scaling undo each other, so the factor is looked for at which the clipped weights have the mean 1.
    """
    low, high = smallest / float(weights.max()), largest / float(weights.min())
    for _ in range(100):  # halving in logarithms: the mean grows with the factor
        factor = (low * high) ** 0.5
        if float((weights * factor).clamp(smallest, largest).mean()) < 1.0:
            low = factor
        else:
            high = factor
    return (weights * high).clamp(smallest, largest)
