"""PaiNN: the polarizable atom interaction network (Schütt, Unke, Gastegger 2021, arXiv 2102.03150)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hydrazero.models.encoder import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry

NORM_EPSILON = 1e-8
"""Under the root of vector norms, so that their slope at zero is finite."""


class PaiNNMessage(nn.Module):
    """Message block: neighbours' scalars and vectors, filtered by distance (paper, eqs. 7 and 8)."""

    def __init__(self, features: int, radial_functions: int) -> None:
        super().__init__()
        self.features = features
        self.context = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, 3 * features))
        # One more input than radial functions: the cutoff function itself, which carries the bias of the filter.
        self.filter = nn.Linear(radial_functions + 1, 3 * features, bias=False)

    def forward(self, scalars: Tensor, vectors: Tensor, pairs: PairGeometry) -> tuple[Tensor, Tensor]:
        """Scalars [A, F], vectors [A, 3, F] -> their changes, of the same shapes."""
        slots = pairs.slots
        context = self.filter(pairs.radial) * slots.gather(self.context(scalars))
        from_scalars, gates, from_directions = context.split(self.features, dim=-1)
        turned = (slots.gather(vectors) * gates.unsqueeze(2)).sum(1)
        # Directions [R, 3, K] times messages [R, K, F]: summed over the slots without a [R, K, 3, F] in between.
        pointed = torch.bmm(pairs.directions.transpose(1, 2), from_directions)
        return slots.sum_rows(from_scalars.sum(1)), slots.sum_rows(turned + pointed)


class PaiNNUpdate(nn.Module):
    """Update block: scalars and vectors of one atom exchange information (paper, eqs. 9 and 10)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.mix = nn.Linear(features, 2 * features, bias=False)
        self.gates = nn.Sequential(nn.Linear(2 * features, features), nn.SiLU(), nn.Linear(features, 3 * features))

    def forward(self, scalars: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Scalars [A, F], vectors [A, 3, F] -> their changes, of the same shapes."""
        u, v = self.mix(vectors).split(self.features, dim=-1)
        norm = torch.sqrt((v * v).sum(1) + NORM_EPSILON)
        for_vectors, for_product, for_scalars = self.gates(torch.cat([scalars, norm], dim=-1)).split(
            self.features, dim=-1
        )
        return for_scalars + for_product * (u * v).sum(1), for_vectors.unsqueeze(1) * u


class PaiNN(Encoder):
    """PaiNN encoder: L blocks of message and update on scalars and vectors."""

    has_vectors = True

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        f = settings.features
        self.messages = nn.ModuleList(PaiNNMessage(f, settings.radial_functions) for _ in range(settings.layers))
        self.updates = nn.ModuleList(PaiNNUpdate(f) for _ in range(settings.layers))

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Encode atoms."""
        scalars = atoms.scalars
        vectors = scalars.new_zeros(scalars.shape[0], 3, scalars.shape[1])
        for message, update in zip(self.messages, self.updates, strict=True):
            change, turn = message(scalars, vectors, pairs)
            scalars, vectors = scalars + change, vectors + turn
            change, turn = update(scalars, vectors)
            scalars, vectors = scalars + change, vectors + turn
        return NodeFeatures(scalars=scalars, vectors=vectors)
