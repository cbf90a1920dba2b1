"""MACE: higher-order equivariant messages (Batatia et al. 2022, arXiv 2206.07697).

A layer makes a density of the neighbours (eq. 8), and products of up to `correlation` densities (eqs. 10 and 11), which
`models.encoders.density_products` describes. Features of atoms are functions on the sphere, [A, (l + 1)^2, F] in
harmonics of natural parity. The messages of the first layer, whose neighbours have scalars only, are fused sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry, size_table
from hydrazero.models.encoders.degree_features import (
    RADIAL_GAIN,
    SILU_GAIN,
    TYPICAL_NEIGHBOURS,
    DegreeMix,
    by_degree,
)
from hydrazero.models.encoders.density_products import DensityProducts
from hydrazero.models.encoders.harmonics import CARTESIAN, Constants, coupling, solid_harmonics
from hydrazero.models.ops.exact import ExactLinear, exact_matmul
from hydrazero.models.ops.pair_sums import PairFactors, Path, pair_sum

RADIAL_HIDDEN = 64


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
        self.features, self.degree, self.of_scalars = settings.features, settings.max_degree, node_degree == 0
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
        """Return densities [A, (L + 1)^2, F] from nodes [A, (l + 1)^2, F] and harmonics of pairs [R, K, (L + 1)^2]."""
        kernels = pairs.slots.kernels
        sent = self.up(nodes, kernels=kernels)
        summed = self._of_scalars(sent, harmonics, pairs) if self.of_scalars else self._sum(sent, harmonics, pairs)
        return self.down(summed / TYPICAL_NEIGHBOURS, kernels=kernels)

    def _of_scalars(self, sent: Tensor, harmonics: Tensor, pairs: PairGeometry) -> Tensor:
        """Return the sums [A, (L + 1)^2, F] of neighbours' scalars [A, 1, F], for which no message has to be stored.

        The hidden layer of the radial functions takes their place in the fused sums, since messages are linear in it.
        """
        hidden = self.radial(pairs.radial).to(pairs.radial.dtype)
        constants = [self.couplings.get(f"{a} 0 {a}", harmonics).flatten()[0] for a in range(self.degree + 1)]
        scale = torch.stack(constants).repeat_interleave(self.features)
        columns = self.weights.weight.t().to(hidden.dtype) * scale
        return pair_sum(
            PairFactors(slots=pairs.slots, radial=hidden, harmonics=harmonics[..., 1:]),
            Path(features=sent, weight=columns[:, : self.features]),
            Path(features=sent.expand(-1, self.degree, -1), weight=columns[:, self.features :]),
        )

    def _sum(self, sent: Tensor, harmonics: Tensor, pairs: PairGeometry) -> Tensor:
        """Return the sums [A, (L + 1)^2, F] of neighbours' features [A, (l + 1)^2, F] times harmonics."""
        rows, slots = harmonics.shape[:2]
        gathered = by_degree(pairs.slots.gather(sent), 2)
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
        return pairs.slots.sum_rows(summed)


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
        self.skips = nn.ModuleList(DegreeMix(degree, f) for degree in degrees)
        self.skip_gates = nn.ModuleList(nn.Linear(f, f) for _ in degrees)
        self.readouts = nn.ModuleList(nn.Linear(f, f) for _ in degrees)

    @property
    def sum_degree(self) -> int:
        """Highest degree of the sums over neighbours."""
        return self.settings.max_degree

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        harmonics = solid_harmonics(pairs.directions, self.settings.max_degree)
        nodes, scalars = atoms.scalars.unsqueeze(1), torch.zeros_like(atoms.scalars)
        kernels = pairs.slots.kernels
        parts = zip(self.densities, self.products, self.skips, self.skip_gates, self.readouts, strict=True)
        for density, products, skip, gate, readout in parts:
            kept = skip(nodes, kernels=kernels) * gate(atoms.scalars).unsqueeze(1)
            nodes = products(density(nodes, harmonics, pairs), atoms.scalars, kernels=kernels)
            nodes = torch.cat([nodes[:, : kept.shape[1]] + kept, nodes[:, kept.shape[1] :]], dim=1)
            scalars = scalars + functional.silu(readout(nodes[:, 0]))
        return NodeFeatures(scalars=scalars, vectors=nodes[:, 1:4][:, list(CARTESIAN)])
