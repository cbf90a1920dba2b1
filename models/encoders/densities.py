"""Layers that take densities of neighbours on each atom and multiply them, as MACE and LACE do.

Features of atoms are functions on the sphere, [(l + 1)^2, A, F] in harmonics of natural parity. The products are taken
on points of the sphere, which couples all degrees at once and exactly (Luo, Chen, Krishnapriyan 2024, arXiv
2401.10216): weights of couplings are products of weights of the degrees, and what belongs to an element in the paper of
MACE (Batatia et al. 2022, arXiv 2206.07697) comes from the first node features, so that charge and spin enter too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry
from hydrazero.models.encoders.degree_features import DegreeMix, by_degree
from hydrazero.models.encoders.harmonics import CARTESIAN, Constants, solid_harmonics, sphere_tables
from hydrazero.models.ops.exact import exact_matmul

TYPICAL_NEIGHBOURS = 10.0
"""Constant by which densities are divided; a constant keeps them smooth and the energy extensive."""
RADIAL_GAIN = 4.0
"""Initial gain of radial functions, which brings them to about one at the length of a bond."""


class DensityProducts(nn.Module):
    """Products of 1 to `correlation` densities, weighted by the initial features of the atom (eqs. 10 and 11)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.order, self.out_degree, f = settings.correlation, settings.node_degree, settings.features
        evaluate, expand = sphere_tables(settings.max_degree, settings.correlation, settings.node_degree)
        self.tables = Constants(evaluate=evaluate, expand=expand)
        self.factors = nn.ModuleList(DegreeMix(settings.max_degree, f) for _ in range(self.order))
        self.weights = nn.Linear(f, self.order * (self.out_degree + 1) * f)
        self.out = DegreeMix(self.out_degree, f)

    def forward(self, densities: Tensor, kinds: Tensor) -> Tensor:
        """Return [(l + 1)^2, A, F] from densities [(L + 1)^2, A, F] and initial features of the atoms [A, F]."""
        atoms, features = kinds.shape
        evaluate, expand = self.tables.get("evaluate", kinds), self.tables.get("expand", kinds)
        weights = self.weights(kinds).view(atoms, self.order, self.out_degree + 1, features).permute(1, 2, 0, 3)
        first, *others = [factor(densities) for factor in self.factors]
        terms = [first[: (self.out_degree + 1) ** 2]]
        product = exact_matmul(evaluate.t(), first.flatten(1))  # on the points, [P, A F]
        for other in others:
            product = product * exact_matmul(evaluate.t(), other.flatten(1))
            terms.append(exact_matmul(expand.t(), product).view(expand.shape[1], atoms, features))
        total = torch.zeros_like(terms[0])
        for term, of_order in zip(terms, weights, strict=True):
            parts = zip(by_degree(term), of_order, strict=True)
            total = total + torch.cat([part * weight for part, weight in parts])
        return self.out(total)


class DensityEncoder(Encoder):
    """Base of encoders with a density and products in each layer.

    Its scalars are sums of readouts of all layers, its vectors those of the last layer.
    """

    has_vectors = True

    def __init__(self, settings: EncoderSettings, density: Callable[[EncoderSettings, int], nn.Module]) -> None:
        """Make layers; `density(settings, degree)` makes densities from nodes of a degree."""
        super().__init__(settings)
        f, degrees = settings.features, [0, *[settings.node_degree] * (settings.layers - 1)]
        self.densities = nn.ModuleList(density(settings, degree) for degree in degrees)
        self.products = nn.ModuleList(DensityProducts(settings) for _ in degrees)
        self.skips = nn.ModuleList(DegreeMix(degree, f) for degree in degrees)
        self.skip_gates = nn.ModuleList(nn.Linear(f, f) for _ in degrees)
        self.readouts = nn.ModuleList(nn.Linear(f, f) for _ in degrees)

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        harmonics = solid_harmonics(pairs.directions, self.settings.max_degree)
        nodes, scalars = atoms.scalars.unsqueeze(0), torch.zeros_like(atoms.scalars)
        parts = zip(self.densities, self.products, self.skips, self.skip_gates, self.readouts, strict=True)
        for density, products, skip, gate, readout in parts:
            kept = skip(nodes) * gate(atoms.scalars)
            nodes = products(density(nodes, harmonics, pairs), atoms.scalars)
            nodes = torch.cat([nodes[: kept.shape[0]] + kept, nodes[kept.shape[0] :]])
            scalars = scalars + functional.silu(readout(nodes[0]))
        return NodeFeatures(scalars=scalars, vectors=nodes[1:4][list(CARTESIAN)].transpose(0, 1))
