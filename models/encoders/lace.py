"""LACE: layers of atomic cluster expansions with linear messages.

It is MACE (Batatia et al. 2022, arXiv 2206.07697) with simpler messages: a neighbour's own features are weighted by the
distance alone, and harmonics of the direction by the distance and the neighbour's scalars. No message couples features
with harmonics, so all of them are fused sums over neighbours (`models.ops.pair_sums`). What the couplings of messages
do in MACE is left to the products of densities.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import EncoderSettings, PairGeometry, size_table
from hydrazero.models.encoders.degree_features import DegreeMix
from hydrazero.models.encoders.densities import RADIAL_GAIN, TYPICAL_NEIGHBOURS, DensityEncoder
from hydrazero.models.ops.pair_sums import PairFactors, Path, pair_sum


def normal_filters(radial_functions: int, columns: int) -> nn.Parameter:
    """Return first weights [N + 1, columns] of filters, with which densities are of about unit size."""
    return nn.Parameter(torch.randn(radial_functions + 1, columns) * RADIAL_GAIN / (radial_functions + 1) ** 0.5)


class LinearDensity(nn.Module):
    """Densities of an atom: sums of its neighbours' features, and of harmonics times its neighbours' scalars."""

    def __init__(self, settings: EncoderSettings, node_degree: int) -> None:
        super().__init__()
        self.features, self.degree = settings.features, settings.max_degree
        self.tensor_filter = normal_filters(settings.radial_functions, (node_degree + 1) * self.features)
        self.scalar_filter = normal_filters(settings.radial_functions, self.degree * self.features)
        self.up = DegreeMix(node_degree, self.features)
        self.scalars_in = nn.Linear(self.features, self.features)
        self.scalars_out = nn.Linear(self.features, self.degree * self.features)

    def forward(self, nodes: Tensor, harmonics: Tensor, pairs: PairGeometry) -> Tensor:
        """Return densities [(L + 1)^2, A, F] from nodes [(l + 1)^2, A, F] and harmonics of pairs [R, K, (L + 1)^2]."""
        scalars = self.scalars_out(functional.silu(self.scalars_in(nodes[0])))
        summed = pair_sum(
            PairFactors(slots=pairs.slots, radial=pairs.radial, harmonics=harmonics[..., 1:]),
            Path(features=self.up(nodes).transpose(0, 1), weight=self.tensor_filter),
            Path(features=scalars.unflatten(-1, (self.degree, self.features)), weight=self.scalar_filter),
        )
        return summed.transpose(0, 1).contiguous() / TYPICAL_NEIGHBOURS


class LACE(DensityEncoder):
    """LACE encoder."""

    sizes = size_table(
        features=(16, 64, 128, 256),
        radial_functions=(8, 8, 8, 8),
        layers=(2, 2, 2, 2),
        max_degree=(2, 3, 3, 3),
        node_degree=(1, 1, 1, 1),
        correlation=(2, 3, 3, 3),
    )

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings, LinearDensity)

    @property
    def sum_degree(self) -> int:
        """Highest degree of the sums over neighbours."""
        return self.settings.max_degree
