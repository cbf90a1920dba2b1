"""EGNN: equivariant graph network (Satorras, Hoogeboom, Welling 2021, arXiv 2102.09844).

The paper changes coordinates from layer to layer. Here the atoms keep their positions, as forces and periodic cells
require, and the displacements are kept as vector features, whose lengths enter the next layer in place of new
distances.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry, size_table
from hydrazero.models.ops.exact import ExactLinear, exact_matmul


class EGNNLayer(nn.Module):
    """Messages of pairs, and the updates of scalars and vectors that they make (paper, eqs. 3 to 6)."""

    def __init__(self, features: int, radial_functions: int, norm_width: float) -> None:
        super().__init__()
        self.norm_width = norm_width
        # phi_e of the concatenated inputs is split, so that the parts of the atoms are computed per atom.
        self.own = nn.Linear(features, features)
        self.other = nn.Linear(features, features, bias=False)
        self.distance = ExactLinear(radial_functions + 1, features, bias=False)
        self.message = nn.Linear(features, features)
        # phi_x is linear here, so it commutes with the sum over neighbours.
        self.turn = nn.Linear(features, features, bias=False)
        self.update_in = nn.Linear(3 * features, features)
        self.update_out = nn.Linear(features, features)

    def forward(self, scalars: Tensor, vectors: Tensor | None, pairs: PairGeometry) -> tuple[Tensor, Tensor]:
        """Return new scalars and vectors from scalars [A, F] and vectors [A, 3, F] (None means zero)."""
        slots = pairs.slots
        inner = slots.gather(self.other(scalars)) + slots.spread(self.own(scalars)).unsqueeze(1)
        inner = functional.silu(inner + self.distance(pairs.radial))
        messages = functional.silu(self.message(inner)) * pairs.inside
        pushed = self.turn(slots.sum_rows(exact_matmul(pairs.directions.transpose(1, 2), messages)))
        vectors = pushed if vectors is None else vectors + pushed
        norm = torch.sqrt((vectors * vectors).sum(1) + self.norm_width**2)
        known = torch.cat([scalars, slots.sum_rows(messages.sum(1)), norm], dim=-1)
        return scalars + self.update_out(functional.silu(self.update_in(known))), vectors


class EGNN(Encoder):
    """EGNN encoder with scalars, and with vectors that are sums of pair directions."""

    has_vectors = True
    sizes = size_table(features=(32, 64, 128, 256), layers=(2, 3, 4, 5))

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        self.layers = nn.ModuleList(
            EGNNLayer(settings.features, settings.radial_functions, settings.norm_width) for _ in range(settings.layers)
        )

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        scalars, vectors = atoms.scalars, None
        for layer in self.layers:
            scalars, vectors = layer(scalars, vectors, pairs)
        return NodeFeatures(scalars=scalars, vectors=vectors)
