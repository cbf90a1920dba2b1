"""Weights that make the tasks' gradients equally long (Chen et al. 2018, GradNorm, arXiv 1711.02257)."""

from __future__ import annotations

import torch

from hydrazero.trainer.balance.base import Balancer, BalanceSection, Observation, bounded, check_measures

LARGEST_JUMP = 100.0
"""Largest ratio of a squared norm to its moving average; one outlier would otherwise lower the weight of a task for
thousands of steps."""


class GradNorm(Balancer):
    """Weights at which the norm of each task's weighted gradient is their mean times (relative loss ratio) ^ alpha.

    This is equation 2 of the paper, which approaches these weights by gradient descent. Here the norms are measured,
    and the weights are set directly.
    """

    def start(self) -> None:
        """Start without any measurement."""
        unknown = torch.full_like(self.weights, float("nan"))
        self.squares, self.losses, self.first_losses = unknown, unknown.clone(), unknown.clone()

    @classmethod
    def check(cls, settings: BalanceSection) -> None:
        """Raise ConfigError if gradients would never be measured."""
        check_measures(settings)

    def update(self, step: int, observed: Observation) -> None:
        """Update the moving averages of losses and squared norms; set the weights if gradients were measured."""
        keep = self.settings.smoothing
        self.losses = smoothed(self.losses, observed.losses, 1.0 - (1.0 - keep) / max(self.settings.every, 1))
        if observed.gram is None:
            return
        # A gradient of zero, of losses whose weights are 0 at the time, contains no information on the task.
        squares = torch.where(observed.gram.diagonal() > 0, observed.gram.diagonal(), float("nan"))
        largest = torch.where(self.squares.isnan(), float("inf"), LARGEST_JUMP * self.squares)
        self.squares = smoothed(self.squares, torch.minimum(squares, largest), keep)
        self.first_losses = torch.where(self.first_losses.isnan(), self.losses, self.first_losses)
        ratio = self.losses / self.first_losses
        known = ~self.squares.isnan() & ~ratio.isnan()
        if not known.any():
            return
        # A negative loss, which an ensemble's spread may have, has no meaningful ratio; it counts as typical.
        ratio = torch.where(ratio > 0, ratio / ratio[known & (ratio > 0)].mean(), 1.0)
        weights = ratio**self.settings.alpha / self.squares.sqrt()
        # A task that has not been measured yet counts like a typical one.
        weights = torch.where(known, weights, weights[known].log().mean().exp())
        self.weights = bounded(weights, self.settings.smallest, self.settings.largest)


def smoothed(old: torch.Tensor, new: torch.Tensor, keep: float) -> torch.Tensor:
    """Return keep * old + (1 - keep) * new; where one of them is NaN, return the other one."""
    mixed = keep * old + (1.0 - keep) * new
    return torch.where(new.isnan(), old, torch.where(old.isnan(), new, mixed))
