"""Weights that stay: equal ones, or by the sizes of the datasets."""

from __future__ import annotations

import torch

from hydrazero.trainer.balance.base import Balancer, bounded


class Uniform(Balancer):
    """Every task counts the same."""


class Static(Balancer):
    """Weights in inverse proportion to the tasks' training structures."""

    def start(self) -> None:
        """Set the weights once."""
        sizes = torch.tensor(self.facts.structures, dtype=torch.float64)
        self.weights = bounded(1.0 / sizes, self.settings.smallest, self.settings.largest)
