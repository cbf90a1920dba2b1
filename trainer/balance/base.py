"""The interface of balancing methods: weights of the tasks, from observations that are the same on every rank."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.settings_parser import Section


class BalanceSection(Section):
    """The weighting of the tasks' losses against each other; each task's own `weight` multiplies the result."""

    method: str = "gradnorm"
    """Balancing method: 'uniform', 'static', 'uncertainty', 'famo' or 'gradnorm', or one that another package adds."""
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
    """Facts on the T tasks of a run that are known before the first step."""

    structures: tuple[int, ...]
    """Number of training structures of each task."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Losses and gradients of a step, of all ranks together."""

    losses: Tensor
    """Loss of each task without its weight, [T] float64; NaN for tasks that have no label in the step."""
    gram: Tensor | None = None
    """Scalar products of the gradients of the tasks' losses, [T, T] float64, with NaN as in `losses`; None in steps in
    which they were not measured."""


@dataclass(kw_only=True)
class Balancer:
    """A balancing method. This one keeps all weights at 1; others override `start`, `update` and `check`."""

    settings: BalanceSection
    facts: BalanceFacts
    weights: Tensor = field(init=False)
    """Present weights, [T] float64, with mean 1 and within the bounds; replaced, never changed in place."""

    def __post_init__(self) -> None:
        self.weights = torch.ones(len(self.facts.structures), dtype=torch.float64)
        self.start()

    def start(self) -> None:
        """Set the attributes of the method before the first step."""

    @classmethod
    def check(cls, settings: BalanceSection) -> None:
        """Raise ConfigError for settings with which the method cannot work."""

    def update(self, step: int, observed: Observation) -> None:
        """Change the weights after a step; `step` counts from 1."""

    def state(self) -> dict[str, Any]:
        """Return all attributes but the settings and facts, for a checkpoint; they must be plain types and tensors."""
        given = ("settings", "facts")
        return copy.deepcopy({name: value for name, value in vars(self).items() if name not in given})

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        vars(self).update(copy.deepcopy(state))


def bounded(weights: Tensor, smallest: float, largest: float) -> Tensor:
    """Return positive weights [T] scaled to mean 1 and clipped to the bounds (smallest <= 1 <= largest).

    Clipping changes the mean and scaling the bounds, so the factor is found at which the clipped weights have mean 1.
    """
    low, high = smallest / float(weights.max()), largest / float(weights.min())
    for _ in range(100):  # bisection in logarithms: the mean grows with the factor
        factor = (low * high) ** 0.5
        if float((weights * factor).clamp(smallest, largest).mean()) < 1.0:
            low = factor
        else:
            high = factor
    return (weights * high).clamp(smallest, largest)


def check_measures(settings: BalanceSection) -> None:
    """Raise ConfigError if a method that depends on `balance.every` is used with measurements turned off."""
    if not settings.every:
        raise ConfigError(
            f"balance.every is {settings.every}; {settings.method} needs it to be at least 1 "
            '(balance.method = "uniform" does not).'
        )
