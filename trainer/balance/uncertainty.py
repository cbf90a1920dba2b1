"""Weights from learned uncertainties (Kendall, Gal, Cipolla 2018, arXiv 1705.07115)."""

from __future__ import annotations

import torch

from hydrazero.trainer.balance.adam import Moments
from hydrazero.trainer.balance.base import Balancer, Seen, bounded


class Uncertainty(Balancer):
    """Each task's loss L counts exp(-s) with s learned to make exp(-s) L + s least, as for a Laplace distribution.

    The gradient 1 - exp(-s) L needs the loss alone, so s is no parameter of the engine.
    """

    def start(self) -> None:
        """Begin with a scale of 1."""
        self.log_scale = torch.zeros_like(self.weights)
        self.moments = Moments()

    def update(self, step: int, seen: Seen) -> None:
        """Take one step on the scales of the tasks that were there."""
        there = ~seen.losses.isnan()
        gradient = torch.where(there, 1.0 - torch.exp(-self.log_scale) * seen.losses.nan_to_num(), 0.0)
        self.log_scale = self.log_scale + self.settings.learning_rate * self.moments.change(gradient, there)
        self.weights = bounded(torch.exp(-self.log_scale), self.settings.smallest, self.settings.largest)
