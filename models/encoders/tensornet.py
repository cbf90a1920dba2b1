"""TensorNet: Cartesian tensor representations (Simeon, De Fabritiis 2023, arXiv 2306.06482).

A node holds a matrix X [3, 3] for each feature: a multiple of the identity, a skew part and a symmetric traceless part,
which rotate like the harmonics of degree 0, 1 and 2; an inversion turns X into its transpose, so that the skew part is
a polar vector. They are kept as the nine coefficients [9, A, F] of an orthonormal basis of matrices in the order of the
harmonics, so that the Frobenius norm of X is that of the coefficients. Messages are sums over neighbours of harmonics,
or of neighbours' coefficients, times filters of the distance; these filters are linear in the radial functions, where
the paper has a perceptron in its interaction layers. The identity part of an atom's first matrices also holds the atom
itself, in place of the self loops of the authors' implementation; without it an atom without neighbours would lose its
element.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry
from hydrazero.models.encoders.degree_features import DegreeMix, by_degree, uniform_filters
from hydrazero.models.encoders.harmonics import CARTESIAN, solid_harmonics, sphere_points
from hydrazero.models.ops.exact import ExactLayerNorm
from hydrazero.models.ops.pair_sums import PairFactors, Path, pair_sum

DEGREE = 2
NORMS = (3.0**0.5, 2.0**0.5, (2.0 / 3.0) ** 0.5)
"""Frobenius norms of the paper's matrices of a unit vector u: the identity, the matrix of the cross product with u, and
u u^T - 1 / 3."""


HARMONICS_AXES = (1, 2, 0)
"""The axes in the order of the harmonics of degree 1: y, z, x; the inverse of `CARTESIAN`."""


@lru_cache
def matrix_basis() -> NDArray[np.float64]:
    """Return nine orthonormal matrices in the order of the harmonics of degree 0, 1 and 2: [9, 3, 3]."""
    identity = np.eye(3)[None] / 3.0**0.5
    cross = np.zeros((3, 3, 3))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        cross[i, j, k], cross[i, k, j] = -1.0, 1.0  # cross[i] v is the cross product of the unit vector along i with v
    points, weights = sphere_points(2 * DEGREE)
    harmonics = solid_harmonics(torch.from_numpy(points), DEGREE).numpy()[:, 4:]
    symmetric = np.einsum("p,pm,pi,pj->mij", weights, harmonics, points, points)
    symmetric[abs(symmetric) < 1e-12] = 0.0
    symmetric /= np.linalg.norm(symmetric, axis=(1, 2), keepdims=True)
    return np.concatenate([identity, cross[list(HARMONICS_AXES)] / 2.0**0.5, symmetric])


BASIS = matrix_basis()


def _combined(factors: NDArray[np.float64], parts: tuple[Tensor, ...]) -> Tensor:
    """Return the sum of factors times parts; written out so that the compiler fuses its few terms into one loop."""
    terms = [float(factor) * part for factor, part in zip(factors, parts, strict=True) if factor]
    return sum(terms[1:], start=terms[0])


def matrices(x: Tensor) -> Tensor:
    """Return the matrices [3, 3, A, F] of coefficients [9, A, F]."""
    parts = x.unbind(0)
    rows = [torch.stack([_combined(BASIS[:, i, j], parts) for j in range(3)]) for i in range(3)]
    return torch.stack(rows)


def coefficients(matrix: Tensor) -> Tensor:
    """Return the coefficients [9, A, F] of matrices [3, 3, A, F]."""
    parts = matrix.flatten(0, 1).unbind(0)
    return torch.stack([_combined(element, parts) for element in BASIS.reshape(9, 9)])


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of matrices [3, 3, A, F] for each atom and feature."""
    return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def normalised(x: Tensor) -> Tensor:
    """Return X / (|X|^2 + 1) of coefficients [9, A, F] (the paper's norm is the squared Frobenius norm)."""
    return x / (x.square().sum(0, keepdim=True) + 1.0)


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
        """Return [9, A, F] for the initial features [A, F]."""
        f = self.features
        ones = torch.ones_like(scalars)
        own, other = self.own(scalars), self.other(scalars)
        x = own * self._summed(ones, pairs) + self._summed(other, pairs)
        x = torch.cat([x[:1] + NORMS[0] * (own + other), x[1:]])
        scales = self.scales(self.norm(x.square().sum(0))).split(f, dim=-1)
        parts = zip(by_degree(self.mix(x)), scales, strict=True)
        return torch.cat([part * scale for part, scale in parts]).to(x.dtype)

    def _summed(self, scalars: Tensor, pairs: PairFactors) -> Tensor:
        f, each = self.features, scalars.unsqueeze(1)
        summed = pair_sum(
            pairs,
            Path(features=each, weight=self.filter[:, :f]),
            Path(features=each.expand(-1, DEGREE, -1), weight=self.filter[:, f:]),
        )
        parts = zip(by_degree(summed.transpose(0, 1)), NORMS, strict=True)
        return torch.cat([part * norm for part, norm in parts])


class TensorInteraction(nn.Module):
    """Messages of neighbours' matrices, and products with them."""

    def __init__(self, features: int, radial_functions: int) -> None:
        super().__init__()
        self.filter = uniform_filters(radial_functions, (DEGREE + 1) * features)
        self.before, self.after = DegreeMix(DEGREE, features), DegreeMix(DEGREE, features)

    def forward(self, x: Tensor, pairs: PairFactors) -> Tensor:
        """Return [9, A, F] for inputs of the same shape."""
        x = normalised(x)  # stays in the precision of the geometry, whatever that of the products is
        y = self.before(x)
        message = pair_sum(pairs, Path(features=y.transpose(0, 1), weight=self.filter), None).transpose(0, 1)
        own, others = matrices(y), matrices(message)
        # The sum of both orders keeps the parity of each part, so that mirror images have the same energy.
        change = self.after(normalised(coefficients(product(own, others) + product(others, own))))
        step = matrices(change)
        return x + change + coefficients(product(step, step)).to(x.dtype)


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
        x = self.embedding(atoms.scalars, factors)
        for interaction in self.interactions:
            x = interaction(x, factors)
        norms = torch.cat([part.square().sum(0) for part in by_degree(x)], dim=-1)
        scalars = functional.silu(self.out(self.norm(norms)))
        return NodeFeatures(scalars=scalars, vectors=x[1:4][list(CARTESIAN)].transpose(0, 1))
