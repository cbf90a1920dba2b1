"""Weights that make the tasks' gradients equally long (Chen et al. 2018, GradNorm, arXiv 1711.02257)."""

from __future__ import annotations

import torch

from hydrazero.trainer.balance.base import Balancer, Seen, bounded

LARGEST_JUMP = 100.0
"""Of a squared norm over what is known of it: one outlier would otherwise hold a task down for thousands of steps."""


class GradNorm(Balancer):
    """Each task's weighted gradient is to be as long as their mean, times (relative loss ratio) ^ alpha (eq. 2).

    The paper moves the weights by gradient descent towards that; with the norms measured, they are set to it.
    """

    def start(self) -> None:
        """Nothing is known of any task yet."""
        unknown = torch.full_like(self.weights, float("nan"))
        self.squares, self.losses, self.first_losses = unknown, unknown.clone(), unknown.clone()

    def update(self, step: int, seen: Seen) -> None:
        """Smooth squared norms and losses; where gradients were measured, set the weights."""
        keep = self.settings.smoothing
        self.losses = smoothed(self.losses, seen.losses, 1.0 - (1.0 - keep) / max(self.settings.every, 1))
        if seen.gram is None:
            return
        # A gradient of nothing, of losses whose weights are 0 at the time, says nothing of the task.
        squares = torch.where(seen.gram.diagonal() > 0, seen.gram.diagonal(), float("nan"))
        most = torch.where(self.squares.isnan(), float("inf"), LARGEST_JUMP * self.squares)
        self.squares = smoothed(self.squares, torch.minimum(squares, most), keep)
        self.first_losses = torch.where(self.first_losses.isnan(), self.losses, self.first_losses)
        ratio = self.losses / self.first_losses
        known = ~self.squares.isnan() & ~ratio.isnan()
        if not known.any():
            return
        # A loss that is negative, as that of an ensemble's spread may become, has no rate; it counts as typical.
        ratio = torch.where(ratio > 0, ratio / ratio[known & (ratio > 0)].mean(), 1.0)
        wanted = ratio**self.settings.alpha / self.squares.sqrt()
        # A task that has not been met yet counts like a typical one.
        wanted = torch.where(known, wanted, wanted[known].log().mean().exp())
        self.weights = bounded(wanted, self.settings.smallest, self.settings.largest)


def smoothed(old: torch.Tensor, new: torch.Tensor, keep: float) -> torch.Tensor:
    """Return keep * old + (1 - keep) * new; whichever is known where the other is NaN."""
    mixed = keep * old + (1.0 - keep) * new
    return torch.where(new.isnan(), old, torch.where(old.isnan(), new, mixed))
