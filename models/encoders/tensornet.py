"""TensorNet: Cartesian tensor representations (Simeon, De Fabritiis 2023, arXiv 2306.06482).

A node holds a matrix X [3, 3] for each feature: a multiple of the identity, a skew part and a symmetric traceless part,
which rotate like the harmonics of degree 0, 1 and 2; an inversion turns X into its transpose, so that the skew part is
a polar vector. They are kept as the nine coefficients [A, 9, F] of an orthonormal basis (`matrix_features`). Messages
are sums over neighbours of harmonics, or of neighbours' coefficients, times filters of the distance; these filters are
linear in the radial functions, where the paper has a perceptron in its interaction layers. The identity part of an
atom's first matrices also holds the atom itself, in place of the self loops of the authors' implementation; without it
an atom without neighbours would lose its element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry
from hydrazero.models.encoders.degree_features import DegreeMix, by_degree, exact_by_degree, uniform_filters
from hydrazero.models.encoders.harmonics import CARTESIAN, solid_harmonics
from hydrazero.models.encoders.matrix_features import DEGREE, changed, normalised, normalised_products
from hydrazero.models.ops.exact import ExactLayerNorm
from hydrazero.models.ops.kernels import FEATURE_TILE
from hydrazero.models.ops.pair_sums import PairFactors, Path, pair_sum

NORMS = (3.0**0.5, 2.0**0.5, (2.0 / 3.0) ** 0.5)
"""Frobenius norms of the paper's matrices of a unit vector u: the identity, the matrix of the cross product with u, and
u u^T - 1 / 3."""


def radial_sums(pairs: PairFactors) -> Tensor:
    """Return the sums [A, 9, B] over neighbours of harmonics times each radial function.

    Filters that all neighbours share may as well multiply these sums, of which there are fewer than features.
    """
    functions = pairs.radial.shape[2]
    columns = FEATURE_TILE * math.ceil(functions / FEATURE_TILE)
    ones = pairs.radial.new_ones(pairs.slots.atoms, DEGREE, columns)
    unit = torch.eye(functions, columns, dtype=ones.dtype, device=ones.device)
    sums = pair_sum(pairs, Path(features=ones[:, :1], weight=unit), Path(features=ones, weight=unit.repeat(1, DEGREE)))
    return sums[:, :, :functions]


def scaled(x: Tensor, scales: Tensor) -> Tensor:
    """Return coefficients [A, 9, F] times a scale [A, 3, F] for each degree."""
    parts = zip(by_degree(x, 1), scales.split(1, dim=1), strict=True)
    return torch.cat([part * scale for part, scale in parts], dim=1)


class TensorEmbedding(nn.Module):
    """Initial matrices: harmonics of neighbours' directions, weighted by both atoms' features."""

    def __init__(self, features: int, radial_functions: int) -> None:
        super().__init__()
        self.features = features
        self.filter = uniform_filters(radial_functions, (DEGREE + 1) * features)
        self.own, self.other = nn.Linear(features, features), nn.Linear(features, features, bias=False)
        self.norm = ExactLayerNorm(features)
        self.scales = nn.Sequential(
            nn.Linear(features, 2 * features),
            nn.SiLU(),
            nn.Linear(2 * features, (DEGREE + 1) * features),
            nn.SiLU(),
        )
        self.mix = DegreeMix(DEGREE, features)

    def forward(self, scalars: Tensor, pairs: PairFactors) -> Tensor:
        """Return [A, 9, F] for the initial features [A, F]."""
        own, other = self.own(scalars).unsqueeze(1), self.other(scalars).unsqueeze(1)
        weight = self.filter.to(pairs.radial.dtype).unflatten(-1, (DEGREE + 1, -1))
        weight = weight * weight.new_tensor(NORMS)[:, None]
        x = own * exact_by_degree(radial_sums(pairs), weight.transpose(0, 1), kernels=pairs.slots.kernels)
        x = x + pair_sum(
            pairs,
            Path(features=other, weight=weight[:, 0]),
            Path(features=other.expand(-1, DEGREE, -1), weight=weight[:, 1:].flatten(1)),
        )
        x = torch.cat([x[:, :1] + NORMS[0] * (own + other), x[:, 1:]], dim=1)
        scales = self.scales(self.norm(x.square().sum(1))).unflatten(-1, (DEGREE + 1, -1))
        return scaled(self.mix(x, kernels=pairs.slots.kernels), scales).to(x.dtype)


class TensorInteraction(nn.Module):
    """Messages of neighbours' matrices, and products with them."""

    def __init__(self, features: int, radial_functions: int) -> None:
        super().__init__()
        self.filter = uniform_filters(radial_functions, (DEGREE + 1) * features)
        self.before, self.after = DegreeMix(DEGREE, features), DegreeMix(DEGREE, features)

    def forward(self, x: Tensor, pairs: PairFactors, *, normalise: bool) -> Tensor:
        """Return [A, 9, F] for normalised inputs of the same shape, normalised for the next layer or not."""
        kernels = pairs.slots.kernels
        y = self.before(x, kernels=kernels)
        message = pair_sum(pairs, Path(features=y, weight=self.filter), None)
        change = self.after(normalised_products(y, message, kernels=kernels), kernels=kernels)
        return changed(x, change, normalise=normalise, kernels=kernels)


class TensorNet(Encoder):
    """TensorNet encoder; its scalars come from the squared norms of the parts, its vectors are the skew parts."""

    has_vectors = True

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        f = settings.features
        self.embedding = TensorEmbedding(f, settings.radial_functions)
        self.interactions = nn.ModuleList(
            TensorInteraction(f, settings.radial_functions) for _ in range(settings.layers)
        )
        self.norm = ExactLayerNorm((DEGREE + 1) * f)
        self.out = nn.Linear((DEGREE + 1) * f, f)

    @property
    def sum_degree(self) -> int:
        """Highest degree of the sums over neighbours."""
        return DEGREE

    @property
    def receptive_radius(self) -> float:
        """Distance in Å beyond which atoms have no influence: the embedding is a message too."""
        return self.settings.cutoff * (self.settings.layers + 1)

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        harmonics = solid_harmonics(pairs.directions, DEGREE)[..., 1:]
        factors = PairFactors(slots=pairs.slots, radial=pairs.radial, harmonics=harmonics)
        # Matrices stay in the precision of the geometry, whatever that of the products with weights is.
        x = normalised(self.embedding(atoms.scalars, factors))
        for interaction in self.interactions:
            x = interaction(x, factors, normalise=interaction is not self.interactions[-1])
        norms = torch.cat([part.square().sum(1) for part in by_degree(x, 1)], dim=-1)
        scalars = functional.silu(self.out(self.norm(norms)))
        return NodeFeatures(scalars=scalars, vectors=x[:, 1:4][:, list(CARTESIAN)])
