"""What every way of balancing tasks shares: a weight per task, from what all ranks have seen, the same on each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from hydrazero.shards.settings_parser import Section


class BalanceSection(Section):
    """How the losses of the tasks are weighted against each other; each task's own `weight` multiplies the result."""

    method: str = "gradnorm"
    """Balancing method: 'uniform', 'static', 'uncertainty', 'famo' or 'gradnorm'."""
    every: NonNegativeInt = 50
    """Number of steps between measurements of the tasks' gradients, and between changes of the weights by the methods
    'famo' and 'gradnorm'. At 0, gradients are not measured."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Fraction of the previous value that a moving average keeps at each measurement."""
    alpha: float = 0.0
    """For the method 'gradnorm': how much more a task counts that has been learning slowly. At 0, the gradients of all
    tasks become equally long; below 0, a task counts more the more it has learned (0 was better than 0.5, see
    docs/results/balancing.md)."""
    learning_rate: NonNegativeFloat = 0.025
    """For the methods 'famo' and 'uncertainty': learning rate of the logarithms of the weights."""
    smallest: float = 0.05
    """Lower bound of the weights, whose mean is 1."""
    largest: float = 20.0
    """Upper bound of the weights, whose mean is 1."""

    @model_validator(mode="after")
    def _check_bounds(self) -> BalanceSection:
        if not 0 < self.smallest <= 1 <= self.largest:
            raise ValueError(
                f"smallest is {self.smallest} and largest is {self.largest}; they must obey "
                "0 < smallest <= 1 <= largest, since the mean of the weights is 1."
            )
        return self


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
