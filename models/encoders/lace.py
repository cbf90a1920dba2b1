"""LACE: layers of atomic cluster expansions with linear messages.

A layer sums densities of an atom's neighbours and multiplies them, as MACE does (Batatia et al. 2022, arXiv
2206.07697), but its messages are simpler: a neighbour's own features are weighted by the distance alone, and harmonics
of the direction by the distance and the neighbour's scalars. No message couples features with harmonics, so all of them
are fused sums over neighbours (`models.ops.pair_sums`). What the couplings of messages do in MACE is left to the
products (`models.encoders.density_products`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry, size_table
from hydrazero.models.encoders.degree_features import (
    RADIAL_GAIN,
    TYPICAL_NEIGHBOURS,
    DegreeMix,
)
from hydrazero.models.encoders.density_products import DensityProducts
from hydrazero.models.encoders.harmonics import CARTESIAN, solid_harmonics
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

    def forward(self, nodes: Tensor, pairs: PairFactors) -> Tensor:
        """Return densities [A, (L + 1)^2, F] from node features [A, (l + 1)^2, F]."""
        scalars = self.scalars_out(functional.silu(self.scalars_in(nodes[:, 0])))
        summed = pair_sum(
            pairs,
            Path(features=self.up(nodes, kernels=pairs.slots.kernels), weight=self.tensor_filter),
            Path(features=scalars.unflatten(-1, (self.degree, self.features)), weight=self.scalar_filter),
        )
        return summed / TYPICAL_NEIGHBOURS


class LACELayer(nn.Module):
    """A density, its products, and what is kept of the node features before."""

    def __init__(self, settings: EncoderSettings, node_degree: int) -> None:
        super().__init__()
        f = settings.features
        self.density = LinearDensity(settings, node_degree)
        self.products = DensityProducts(settings)
        self.skip, self.skip_gate = DegreeMix(node_degree, f), nn.Linear(f, f)
        self.readout = nn.Linear(f, f)

    def forward(self, nodes: Tensor, kinds: Tensor, pairs: PairFactors) -> tuple[Tensor, Tensor]:
        """Return new node features [A, (l + 1)^2, F], and a readout of them [A, F]."""
        kernels = pairs.slots.kernels
        kept = self.skip(nodes, kernels=kernels) * self.skip_gate(kinds).unsqueeze(1)
        out = self.products(self.density(nodes, pairs), kinds, kernels=kernels)
        nodes = torch.cat([out[:, : kept.shape[1]] + kept, out[:, kept.shape[1] :]], dim=1)
        return nodes, functional.silu(self.readout(nodes[:, 0]))


class LACE(Encoder):
    """LACE encoder; its scalars are sums of readouts of all layers, its vectors those of the last layer."""

    has_vectors = True
    sizes = size_table(
        features=(16, 64, 128, 256),
        radial_functions=(8, 8, 8, 8),
        layers=(2, 2, 2, 2),
        max_degree=(2, 3, 3, 3),
        node_degree=(1, 1, 1, 1),
        correlation=(2, 3, 3, 3),
    )

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        degrees = [0, *[settings.node_degree] * (settings.layers - 1)]
        self.layers = nn.ModuleList(LACELayer(settings, degree) for degree in degrees)

    @property
    def sum_degree(self) -> int:
        """Highest degree of the sums over neighbours."""
        return self.settings.max_degree

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        harmonics = solid_harmonics(pairs.directions, self.settings.max_degree)[..., 1:]
        factors = PairFactors(slots=pairs.slots, radial=pairs.radial, harmonics=harmonics)
        nodes, scalars = atoms.scalars.unsqueeze(1), torch.zeros_like(atoms.scalars)
        for layer in self.layers:
            nodes, readout = layer(nodes, atoms.scalars, factors)
            scalars = scalars + readout
        return NodeFeatures(scalars=scalars, vectors=nodes[:, 1:4][:, list(CARTESIAN)])
