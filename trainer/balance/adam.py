"""Adam (Kingma, Ba 2015, arXiv 1412.6980) for the few parameters of a balancing method, outside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8


@dataclass(kw_only=True)
class Moments:
    """Running moments of the gradients of T parameters, some of which may have no gradient in a step.

    Checkpoints hold objects of it by the names of class and module, which must therefore stay as they are.
    """

    first: Tensor = field(default_factory=lambda: torch.zeros(0))
    second: Tensor = field(default_factory=lambda: torch.zeros(0))
    steps: Tensor = field(default_factory=lambda: torch.zeros(0))

    def change(self, gradient: Tensor, present: Tensor) -> Tensor:
        """Add gradients where `present` is true; return the change of the parameters at a learning rate of 1.

        All three are [T], for T parameters.
        """
        if not len(self.steps):
            self.first, self.second, self.steps = (torch.zeros_like(gradient) for _ in range(3))
        self.steps = self.steps + present
        self.first = torch.where(present, FIRST * self.first + (1 - FIRST) * gradient, self.first)
        self.second = torch.where(present, SECOND * self.second + (1 - SECOND) * gradient**2, self.second)
        count = self.steps.clamp(min=1)
        mean, square = self.first / (1 - FIRST**count), self.second / (1 - SECOND**count)
        return torch.where(present, -mean / (square.sqrt() + EPSILON), 0.0)
