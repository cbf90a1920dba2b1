"""Node features of several degrees, [components, A, F], in the order of the harmonics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def components(degree: int) -> list[int]:
    """Return the number of components of each degree from 0 to `degree`."""
    return [2 * l + 1 for l in range(degree + 1)]  # noqa: E741


def by_degree(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """Split an axis of (L + 1)^2 components into the degrees 0 to L.

    Slices would do the same, but their derivatives are padded with zeros.
    """
    return x.split(components(math.isqrt(x.shape[dim]) - 1), dim=dim)


class DegreeMix(nn.Module):
    """Mix features, with a separate matrix for each degree."""

    def __init__(self, degree: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(degree + 1, features, features) / features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return [(L + 1)^2, A, F] for inputs of the same shape."""
        return torch.cat([part @ weight for part, weight in zip(by_degree(x), self.weight.unbind(0), strict=True)])


def uniform_filters(radial_functions: int, columns: int) -> nn.Parameter:
    """Return weights [N + 1, columns] of filters; the last row belongs to the cutoff function and is their bias."""
    bound = 1.0 / math.sqrt(radial_functions + 1)
    return nn.Parameter(torch.empty(radial_functions + 1, columns).uniform_(-bound, bound))
