"""Weights that do not change during training: equal ones, or by the sizes of the datasets."""

from __future__ import annotations

from typing import Any

import torch

from hydrazero.trainer.balance.base import Balancer, bounded


class Uniform(Balancer):
    """The weight 1 for every task."""


class Static(Balancer):
    """Weights in inverse proportion to the tasks' numbers of training structures."""

    def start(self) -> None:
        """Set the weights once."""
        sizes = torch.tensor(self.facts.structures, dtype=torch.float64)
        self.weights = bounded(1.0 / sizes, self.settings.smallest, self.settings.largest)

    def load(self, state: dict[str, Any]) -> None:
        """Keep the weights that were set, which depend on the settings alone."""
