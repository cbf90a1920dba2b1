"""Fast adaptive multi-task optimization (Liu, Feng, Stone, Liu 2023, arXiv 2306.03792)."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrazero.trainer.balance.adam import Moments
from hydrazero.trainer.balance.base import Balancer, BalanceSection, Observation, bounded, check_measures

DECAY = 0.001
"""Weight decay of the logits (the paper's gamma)."""
SMALLEST_LOSS = 1e-8
"""Losses below this one count as this one, so that their logarithm is finite."""


class Famo(Balancer):
    """Weights z / loss with shares z = softmax(xi), which grow for the tasks that improve least (paper, eqs. 9 and 10).

    The paper compares losses before and after each step on the same batch, which takes another forward pass. Here the
    mean log losses of the last `every` steps are compared with those of the same number of steps before them; this
    costs nothing, and includes tasks that are not in every batch.
    """

    def start(self) -> None:
        """Start with equal shares."""
        tasks = len(self.weights)
        self.logits = torch.zeros(tasks, dtype=torch.float64)
        self.sums, self.counts = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self.before = torch.full_like(self.logits, float("nan"))
        self.moments = Moments()

    @classmethod
    def check(cls, settings: BalanceSection) -> None:
        """Raise ConfigError if the method would never change the weights."""
        check_measures(settings)

    def update(self, step: int, observed: Observation) -> None:
        """Add up log losses; every `every` steps, move the logits towards the tasks that improve least."""
        present = ~observed.losses.isnan()
        self.sums = self.sums + torch.where(present, observed.losses.clamp(min=SMALLEST_LOSS).log(), 0.0).nan_to_num()
        self.counts = self.counts + present
        if not self.settings.every or step % self.settings.every:
            return
        means = self.sums / self.counts  # NaN for a task that was in no step
        improvement = (self.before - means).nan_to_num(0.0)
        shares = torch.softmax(self.logits, 0)
        # The transposed derivative of the softmax, times the improvements.
        slope = shares * (improvement - (shares * improvement).sum())
        change = self.moments.change(slope + DECAY * self.logits, torch.ones_like(present))
        self.logits = self.logits + self.settings.learning_rate * change
        self.before = torch.where(means.isnan(), self.before, means)
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        self.weights = self._weights(torch.softmax(self.logits, 0))

    def _weights(self, shares: Tensor) -> Tensor:
        losses = self.before.exp()
        known = ~losses.isnan()
        if not known.any():
            return self.weights
        typical = losses[known].log().mean().exp()
        return bounded(shares / torch.where(known, losses, typical), self.settings.smallest, self.settings.largest)
