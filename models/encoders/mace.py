"""MACE: higher-order equivariant messages (Batatia et al. 2022, arXiv 2206.07697).

Features of an atom are functions on the sphere, [A, (l + 1)^2, F] in harmonics of natural parity. A layer makes a
density of the neighbours (eq. 8), and products of up to `correlation` densities (eq. 10, 11). The products are taken
on points of the sphere, which couples all degrees at once and exactly (Luo, Chen, Krishnapriyan 2024, arXiv
2401.10216): weights of couplings are products of weights of the degrees, and what belongs to an element in the paper
comes from the first node features, so that charge and spin enter too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry, size_table
from hydrazero.models.encoders.harmonics import CARTESIAN, Constants, coupling, solid_harmonics, sphere_tables
from hydrazero.models.ops.exact import ExactLinear, exact_matmul

TYPICAL_NEIGHBOURS = 10.0
"""Constant by which densities are divided; a constant keeps them smooth and the energy extensive."""
RADIAL_HIDDEN = 64
RADIAL_GAIN = 4.0
"""Initial gain of radial functions, which brings them to about one at the length of a bond."""
SILU_GAIN = 1.7
"""Gain that brings silu of a normal variable back to unit variance."""


def by_degree(x: Tensor, degree: int, dim: int) -> tuple[Tensor, ...]:
    """Split an axis in the order of harmonics into degrees 0 to `degree`; slices would fill tensors with zeros."""
    return x.split([2 * l + 1 for l in range(degree + 1)], dim=dim)  # noqa: E741


def radial_layer(layer: nn.Linear, gain: float) -> nn.Linear:
    """Initialise a layer without a bias, which therefore keeps zero at the cutoff.

    The initialisation of PyTorch would make densities of about 0.001, whose products do not contribute for long.
    """
    nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
    return layer


class DegreeLinear(nn.Module):
    """Mix channels, with a separate matrix for each degree."""

    def __init__(self, degree: int, features: int) -> None:
        super().__init__()
        self.degree = degree
        self.weight = nn.Parameter(torch.randn(degree + 1, features, features) / features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return [A, (l + 1)^2, F] for inputs of the same shape."""
        parts = zip(by_degree(x, self.degree, 1), self.weight.unbind(0), strict=True)
        return torch.cat([part @ weight for part, weight in parts], dim=1)


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
        self.up = DegreeLinear(node_degree, settings.features)
        self.radial = nn.Sequential(
            radial_layer(ExactLinear(settings.radial_functions + 1, RADIAL_HIDDEN, bias=False), RADIAL_GAIN),
            nn.SiLU(),
            radial_layer(nn.Linear(RADIAL_HIDDEN, RADIAL_HIDDEN, bias=False), SILU_GAIN),
            nn.SiLU(),
        )
        self.weights = radial_layer(
            nn.Linear(RADIAL_HIDDEN, len(self.paths) * settings.features, bias=False), SILU_GAIN
        )
        self.down = DegreeLinear(self.degree, settings.features)

    def forward(self, nodes: Tensor, harmonics: Tensor, pairs: PairGeometry) -> Tensor:
        """Return densities [A, (L + 1)^2, F] from nodes [A, (l + 1)^2, F] and harmonics of pairs [R, K, (L + 1)^2]."""
        rows, slots = harmonics.shape[:2]
        gathered = by_degree(pairs.slots.gather(self.up(nodes)), self.up.degree, 2)
        directions = by_degree(harmonics, self.degree, 2)
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
        return self.down(pairs.slots.sum_rows(summed) / TYPICAL_NEIGHBOURS)


class DensityProducts(nn.Module):
    """Products of 1 to `correlation` densities, weighted by the initial features of the atom (eqs. 10 and 11)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.order, self.out_degree, self.features = settings.correlation, settings.node_degree, settings.features
        evaluate, expand = sphere_tables(settings.max_degree, settings.correlation, settings.node_degree)
        self.tables = Constants(evaluate=evaluate, expand=expand)
        self.factors = nn.ModuleList(DegreeLinear(settings.max_degree, self.features) for _ in range(self.order))
        self.weights = nn.Linear(self.features, self.order * (self.out_degree + 1) * self.features)
        self.out = DegreeLinear(self.out_degree, self.features)

    def forward(self, densities: Tensor, kinds: Tensor) -> Tensor:
        """Return [A, (l + 1)^2, F] from densities [A, (L + 1)^2, F] and initial features of the atoms [A, F]."""
        atoms = densities.shape[0]
        evaluate, expand = self.tables.get("evaluate", kinds), self.tables.get("expand", kinds)
        weights = self.weights(kinds).view(atoms, self.order, self.out_degree + 1, self.features)
        total: Tensor | None = None
        product: Tensor | None = None
        for order, factor in enumerate(self.factors):
            # Product of [P, L] and [A, L, F]: values of the functions on the points, [A, P, F].
            values = exact_matmul(evaluate.t(), factor(densities))
            product = values if product is None else product * values
            expanded = exact_matmul(expand.t(), product)
            parts = zip(by_degree(expanded, self.out_degree, 1), weights[:, order].split(1, dim=1), strict=True)
            term = torch.cat([part * weight for part, weight in parts], dim=1)
            total = term if total is None else total + term
        if total is None:
            raise ValueError("correlation must be at least 1.")
        return self.out(total)


class MACE(Encoder):
    """MACE encoder; its scalars are sums of readouts of all layers, its vectors those of the last layer."""

    has_vectors = True
    sizes = size_table(
        features=(16, 32, 64, 128),
        layers=(2, 2, 2, 2),
        max_degree=(2, 2, 3, 3),
        node_degree=(1, 1, 1, 1),
        correlation=(2, 3, 3, 3),
    )

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        f, degrees = settings.features, [0, *[settings.node_degree] * (settings.layers - 1)]
        self.densities = nn.ModuleList(NeighbourDensity(settings, degree) for degree in degrees)
        self.products = nn.ModuleList(DensityProducts(settings) for _ in degrees)
        self.skips = nn.ModuleList(DegreeLinear(degree, f) for degree in degrees)
        self.skip_gates = nn.ModuleList(nn.Linear(f, f) for _ in degrees)
        self.readouts = nn.ModuleList(nn.Linear(f, f) for _ in degrees)

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        harmonics = solid_harmonics(pairs.directions, self.settings.max_degree)
        nodes, scalars = atoms.scalars.unsqueeze(1), torch.zeros_like(atoms.scalars)
        parts = zip(self.densities, self.products, self.skips, self.skip_gates, self.readouts, strict=True)
        for density, products, skip, gate, readout in parts:
            kept = skip(nodes) * gate(atoms.scalars).unsqueeze(1)
            nodes = products(density(nodes, harmonics, pairs), atoms.scalars)
            nodes = torch.cat([nodes[:, : kept.shape[1]] + kept, nodes[:, kept.shape[1] :]], dim=1)
            scalars = scalars + functional.silu(readout(nodes[:, 0]))
        return NodeFeatures(scalars=scalars, vectors=nodes[:, 1:4][:, list(CARTESIAN)])
