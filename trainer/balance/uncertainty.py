"""Weights from learned uncertainties (Kendall, Gal, Cipolla 2018, arXiv 1705.07115)."""

from __future__ import annotations

import torch

from hydrazero.trainer.balance.adam import Moments
from hydrazero.trainer.balance.base import Balancer, Observation, bounded


class Uncertainty(Balancer):
    """Weights exp(-s), where s minimises exp(-s) L + s for the task's loss L, as for a Laplace distribution.

    The gradient 1 - exp(-s) L depends on the loss alone, so s need not be a parameter of the engine.
    """

    def start(self) -> None:
        """Start with scales of 1."""
        self.log_scale = torch.zeros_like(self.weights)
        self.moments = Moments()

    def update(self, step: int, observed: Observation) -> None:
        """Do one step of Adam on the scales of the tasks that have labels in the step."""
        present = ~observed.losses.isnan()
        gradient = torch.where(present, 1.0 - torch.exp(-self.log_scale) * observed.losses.nan_to_num(), 0.0)
        self.log_scale = self.log_scale + self.settings.learning_rate * self.moments.change(gradient, present)
        self.weights = bounded(torch.exp(-self.log_scale), self.settings.smallest, self.settings.largest)
