"""MACE: higher-order equivariant messages (Batatia et al. 2022, arXiv 2206.07697).

A layer makes a density of the neighbours (eq. 8), and products of up to `correlation` densities (eqs. 10 and 11), which
`models.encoders.densities` describes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hydrazero.models.encoders.base import EncoderSettings, PairGeometry, size_table
from hydrazero.models.encoders.degree_features import DegreeMix, by_degree
from hydrazero.models.encoders.densities import RADIAL_GAIN, TYPICAL_NEIGHBOURS, DensityEncoder
from hydrazero.models.encoders.harmonics import Constants, coupling
from hydrazero.models.ops.exact import ExactLinear, exact_matmul

RADIAL_HIDDEN = 64
SILU_GAIN = 1.7
"""Gain that brings silu of a normal variable back to unit variance."""


def radial_layer(layer: nn.Linear, gain: float) -> nn.Linear:
    """Initialise a layer without a bias, which therefore keeps zero at the cutoff.

    The initialisation of PyTorch would make densities of about 0.001, whose products do not contribute for long.
    """
    nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
    return layer


class NeighbourDensity(nn.Module):
    """Densities: neighbours' features times harmonics of their direction and functions of their distance (eq. 8)."""

    def __init__(self, settings: EncoderSettings, node_degree: int) -> None:
        super().__init__()
        self.features, self.degree = settings.features, settings.max_degree
        self.paths = [
            (pair, node, out)
            for node in range(node_degree + 1)
            for pair in range(self.degree + 1)
            for out in range(abs(pair - node), min(pair + node, self.degree) + 1)
            if (pair + node + out) % 2 == 0
        ]
        self.couplings = Constants(**{f"{a} {b} {c}": coupling(a, b, c) for a, b, c in self.paths})
        self.up = DegreeMix(node_degree, settings.features)
        self.radial = nn.Sequential(
            radial_layer(ExactLinear(settings.radial_functions + 1, RADIAL_HIDDEN, bias=False), RADIAL_GAIN),
            nn.SiLU(),
            radial_layer(nn.Linear(RADIAL_HIDDEN, RADIAL_HIDDEN, bias=False), SILU_GAIN),
            nn.SiLU(),
        )
        self.weights = radial_layer(
            nn.Linear(RADIAL_HIDDEN, len(self.paths) * settings.features, bias=False), SILU_GAIN
        )
        self.down = DegreeMix(self.degree, settings.features)

    def forward(self, nodes: Tensor, harmonics: Tensor, pairs: PairGeometry) -> Tensor:
        """Return densities [(L + 1)^2, A, F] from nodes [(l + 1)^2, A, F] and harmonics of pairs [R, K, (L + 1)^2]."""
        rows, slots = harmonics.shape[:2]
        gathered = by_degree(pairs.slots.gather(self.up(nodes).transpose(0, 1)), 2)
        directions = by_degree(harmonics, 2)
        weights = self.weights(self.radial(pairs.radial)).split(self.features, dim=-1)
        parts: list[list[Tensor]] = [[] for _ in range(self.degree + 1)]
        for (pair, node, out), weight in zip(self.paths, weights, strict=True):
            constants = self.couplings.get(f"{pair} {node} {out}", harmonics)
            # Product of [R, K, a] and [a, b, c], as [R, c, K, b].
            mix = exact_matmul(directions[pair], constants.flatten(1)).unflatten(-1, constants.shape[1:])
            mix = mix.permute(0, 3, 1, 2)
            messages = gathered[node] * weight.unsqueeze(2)
            flat = slots * (2 * node + 1)
            messages = messages.reshape(rows, flat, self.features)
            parts[out].append(exact_matmul(mix.reshape(rows, 2 * out + 1, flat), messages))
        summed = torch.cat([torch.stack(part).sum(0) for part in parts], dim=1)
        densities = pairs.slots.sum_rows(summed).transpose(0, 1).contiguous()
        return self.down(densities / TYPICAL_NEIGHBOURS)


class MACE(DensityEncoder):
    """MACE encoder; its scalars are sums of readouts of all layers, its vectors those of the last layer."""

    sizes = size_table(
        features=(16, 32, 64, 128),
        layers=(2, 2, 2, 2),
        max_degree=(2, 2, 3, 3),
        node_degree=(1, 1, 1, 1),
        correlation=(2, 3, 3, 3),
    )

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings, NeighbourDensity)
