"""Products of the densities of neighbours on each atom, as in MACE and LACE.

Features of atoms are functions on the sphere, [A, (l + 1)^2, F] in harmonics of natural parity. Products on points of
the sphere couple all degrees at once (`models.ops.sphere_products`): weights of couplings are products of weights of
the degrees, and what belongs to an element in the paper of MACE (Batatia et al. 2022, arXiv 2206.07697) comes from the
first node features, so that charge and spin enter too.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.encoders.degree_features import DegreeMix, by_degree, components, mix_degrees
from hydrazero.models.encoders.harmonics import Constants, sphere_tables
from hydrazero.models.ops.kernels import FEATURE_TILE
from hydrazero.models.ops.sphere_products import POINT_TILE, Sphere, sphere_product


class DensityProducts(nn.Module):
    """Products of 1 to `correlation` densities, weighted by the initial features of the atom (MACE, eqs. 10 and 11)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        f, degree = settings.features, settings.max_degree
        self.order, self.out_degree = settings.correlation, settings.node_degree
        harmonics, weights = sphere_tables(degree, degree * self.order + self.out_degree, POINT_TILE)
        sizes = components(self.out_degree)
        # The average of the square of a harmonic over the sphere is 1 / (2 l + 1).
        lengths = np.repeat(sizes, sizes).astype(np.float64)[:, None]
        self.tables = Constants(harmonics=harmonics, weights=weights, lengths=lengths)
        self.factors = nn.ModuleList(DegreeMix(degree, f) for _ in range(self.order))
        self.weights = nn.Linear(f, self.order * (self.out_degree + 1) * f)
        self.out = DegreeMix(self.out_degree, f)

    def forward(self, densities: Tensor, kinds: Tensor, *, kernels: bool = False) -> Tensor:
        """Return [A, (l + 1)^2, F] from densities [A, (L + 1)^2, F] and initial features of the atoms [A, F]."""
        features, outputs = kinds.shape[1], (self.out_degree + 1) ** 2
        # One product of matrices makes all factors.
        matrices = torch.cat([cast(Tensor, factor.weight) for factor in self.factors], dim=2)
        factors = mix_degrees(densities, matrices, kernels=kernels).split(features, dim=2)
        sphere = Sphere(harmonics=self.tables.get("harmonics", kinds), weights=self.tables.get("weights", kinds))
        terms, lengths = [factors[0][:, :outputs]], self.tables.get("lengths", kinds)
        by_kernel = kernels and features % FEATURE_TILE == 0
        for count in range(2, self.order + 1):
            terms.append(sphere_product(factors[:count], sphere, outputs, kernels=by_kernel) * lengths)
        of_orders = self.weights(kinds).unflatten(-1, (self.order, self.out_degree + 1, features)).unbind(1)
        total = torch.zeros_like(terms[-1])
        for term, weights in zip(terms, of_orders, strict=True):
            parts = zip(by_degree(term, 1), weights.split(1, dim=1), strict=True)
            total = total + torch.cat([part * weight for part, weight in parts], dim=1)
        out: Tensor = self.out(total, kernels=kernels)
        return out
