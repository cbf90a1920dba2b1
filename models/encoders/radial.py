"""Radial basis functions and cutoff functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SincBasis(nn.Module):
    """Functions sin(n pi r / r_c) / r for n = 1 ... N (Schütt et al. 2021, PaiNN, eq. 10), scaled to unit size."""

    frequencies: Tensor

    def __init__(self, functions: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("frequencies", torch.arange(1, functions + 1) * math.pi / cutoff, persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """Return [..., N] for distances [...] in Å; distances must be above zero."""
        frequencies = self.frequencies.to(distance.dtype)
        scale = math.sqrt(2.0 / self.cutoff)
        return scale * torch.sin(distance[..., None] * frequencies) / distance[..., None]


class GaussianBasis(nn.Module):
    """Gaussians at N even distances from 0 to the cutoff, as wide as their spacing (Schütt et al. 2018, SchNet)."""

    centres: Tensor

    def __init__(self, functions: int, cutoff: float) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(0.0, cutoff, functions), persistent=False)
        self.exponent = -0.5 / (cutoff / max(functions - 1, 1)) ** 2

    def forward(self, distance: Tensor) -> Tensor:
        """Return [..., N] for distances [...] in Å."""
        return torch.exp(self.exponent * (distance[..., None] - self.centres.to(distance.dtype)) ** 2)


BASES: dict[str, type[SincBasis] | type[GaussianBasis]] = {"sinc": SincBasis, "gaussian": GaussianBasis}


def cosine_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """Return (1 + cos(pi r / r_c)) / 2 inside the cutoff, 0 outside (Behler 2011); its slope is 0 at the cutoff."""
    inside = 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1.0)
    return torch.where(distance < cutoff, inside, torch.zeros_like(inside))


def polynomial_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """Return 1 - 28 x^6 + 48 x^7 - 21 x^8, x = r / r_c (Gasteiger et al. 2020, DimeNet, eq. 8, p = 6)."""
    x = distance / cutoff
    inside = 1.0 - 28.0 * x**6 + 48.0 * x**7 - 21.0 * x**8
    return torch.where(distance < cutoff, inside, torch.zeros_like(inside))


CUTOFFS = {"cosine": cosine_cutoff, "polynomial": polynomial_cutoff}
