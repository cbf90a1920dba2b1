"""Node features of several degrees, [A, components, F], in the order of the harmonics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hydrazero.models.ops.exact import exact_matmul
from hydrazero.models.ops.node_products import degree_linear

TYPICAL_NEIGHBOURS = 10.0
"""Constant by which densities are divided; a constant keeps them smooth and the energy extensive."""
RADIAL_GAIN = 4.0
"""Initial gain of radial functions, which brings them to about one at the length of a bond."""
SILU_GAIN = 1.7
"""Gain that brings silu of a normal variable back to unit variance."""


def components(degree: int) -> list[int]:
    """Return the number of components of each degree from 0 to `degree`."""
    return [2 * l + 1 for l in range(degree + 1)]  # noqa: E741


def by_degree(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """Split an axis of (L + 1)^2 components into the degrees 0 to L.

    Slices would do the same, but their derivatives are padded with zeros.
    """
    return x.split(components(math.isqrt(x.shape[dim]) - 1), dim=dim)


def exact_by_degree(x: Tensor, weight: Tensor, *, kernels: bool = False) -> Tensor:
    """Return features [A, (L + 1)^2, I] times the matrix of their degree in weight [L + 1, I, O], not rounded."""
    if kernels:
        return degree_linear(x, weight)
    parts = zip(by_degree(x, 1), weight.unbind(0), strict=True)
    return torch.cat([exact_matmul(part, matrix) for part, matrix in parts], dim=1)


def mix_degrees(x: Tensor, weight: Tensor, *, kernels: bool = False) -> Tensor:
    """Return features [A, (L + 1)^2, I] times the matrix of their degree in weight [L + 1, I, O], under autocast."""
    if kernels:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if torch.is_autocast_enabled("cpu") and dtype != torch.float64:  # as for all products of matrices
            dtype = torch.get_autocast_dtype("cpu")
        return degree_linear(x.to(dtype), weight.to(dtype))
    return torch.cat([part @ matrix for part, matrix in zip(by_degree(x, 1), weight.unbind(0), strict=True)], dim=1)


class DegreeMix(nn.Module):
    """Mix features, with a separate matrix for each degree."""

    def __init__(self, degree: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(degree + 1, features, features) / features**0.5)

    def forward(self, x: Tensor, *, kernels: bool = False) -> Tensor:
        """Return [A, (L + 1)^2, F] for inputs of the same shape."""
        return mix_degrees(x, self.weight, kernels=kernels)


def uniform_filters(radial_functions: int, columns: int) -> nn.Parameter:
    """Return weights [N + 1, columns] of filters; the last row belongs to the cutoff function and is their bias."""
    bound = 1.0 / math.sqrt(radial_functions + 1)
    return nn.Parameter(torch.empty(radial_functions + 1, columns).uniform_(-bound, bound))
