"""Equivariant principal neighbourhood aggregation: several aggregators of one message, scaled by the degree.

Principal neighbourhood aggregation (Corso et al. 2020, arXiv 2004.05718) on the scalars and vectors of PaiNN (Schütt et
al. 2021). Energies must not jump where a neighbour leaves the cutoff, so a neighbour counts by its cutoff function: the
degree is the sum of those, moments are weighted with them, and the maximum is a soft one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry
from hydrazero.models.encoders.painn import PaiNNUpdate
from hydrazero.models.ops.exact import ExactLinear
from hydrazero.models.ops.pair_sums import PairFactors, Path, pair_sum
from hydrazero.models.ops.slots import Slots

AGGREGATES = 4
SCALERS = 3
TYPICAL_DEGREE = 10.0
"""Number of neighbours, counted by their cutoff functions, at which scalers are one."""
SOFT_RANGE = 5.0
"""Limit of the logits of the soft maximum, which keeps exponentials finite."""
SMALLEST_SPREAD = 1e-3
"""Minimum width in the root of the standard deviation, which keeps its slope finite where neighbours agree."""


def aggregates(slots: Slots, messages: Tensor, inside: Tensor, width: float) -> Tensor:
    """Return sum, mean, deviation and soft maximum of messages [R, K, F] with weights [R, K, 1]: [A, 4 F].

    One additional neighbour of weight 0 and message 0 is included, so that all of them are 0 without neighbours, and
    smooth. The deviation is rounded off below `width`, where neighbours agree.
    """
    features = messages.shape[-1]
    weighted = messages * inside
    soft = inside * torch.exp(SOFT_RANGE * torch.tanh(messages / SOFT_RANGE))
    columns = torch.cat([weighted, weighted * messages, soft, soft * messages], dim=-1).sum(1)
    sums = slots.sum_rows(torch.cat([columns, inside.sum(1)], dim=-1))
    total, squares, soft_weight, soft_total = sums[:, :-1].split(features, dim=-1)
    count = 1.0 + sums[:, -1:]
    mean = total / count
    deviation = torch.sqrt(squares / count - mean * mean + width**2) - width
    return torch.cat([total, mean, deviation, soft_total / (1.0 + soft_weight)], dim=-1)


class PNAMessage(nn.Module):
    """Message block as in PaiNN, except that scalar messages are aggregated in several ways."""

    def __init__(self, features: int, radial_functions: int, norm_width: float) -> None:
        super().__init__()
        self.features, self.width = features, max(norm_width, SMALLEST_SPREAD)
        self.context_in = nn.Linear(features, features)
        self.context_out = nn.Linear(features, 3 * features)
        self.scalar_filter = ExactLinear(radial_functions, features)
        self.vector_filter = nn.Parameter(torch.empty(radial_functions + 1, 2 * features))
        nn.init.uniform_(self.vector_filter, -1.0 / math.sqrt(radial_functions), 1.0 / math.sqrt(radial_functions))
        self.mix = nn.Linear(AGGREGATES * SCALERS * features, features)

    def forward(
        self, scalars: Tensor, vectors: Tensor | None, functions: Tensor, pairs: PairGeometry
    ) -> tuple[Tensor, Tensor]:
        """Return changes of scalars [A, F] and vectors [A, 3, F] (None means zero); radial functions are [R, K, N]."""
        slots = pairs.slots
        context = self.context_out(functional.silu(self.context_in(scalars)))
        for_scalars, gates, for_directions = context.split(self.features, dim=-1)
        gated = None if vectors is None else gates.unsqueeze(1) * vectors
        f = self.features
        turned = pair_sum(
            PairFactors(slots=slots, radial=pairs.radial, harmonics=pairs.directions),
            None if gated is None else Path(features=gated, weight=self.vector_filter[:, :f]),
            Path(features=for_directions.unsqueeze(1), weight=self.vector_filter[:, f:]),
        )[:, 1:]
        messages = self.scalar_filter(functions) * slots.gather(for_scalars)
        found = aggregates(slots, messages, pairs.inside, self.width)
        degree = torch.log1p(slots.sum_rows(pairs.inside.sum(1))) / math.log1p(TYPICAL_DEGREE)
        return self.mix(torch.cat([found, found * degree, found * (2.0 / (1.0 + degree))], dim=-1)), turned


class PNAEquivariant(Encoder):
    """PNA encoder: blocks of message and update on scalars and vectors."""

    has_vectors = True

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        f, width = settings.features, settings.norm_width
        self.messages = nn.ModuleList(PNAMessage(f, settings.radial_functions, width) for _ in range(settings.layers))
        self.updates = nn.ModuleList(PaiNNUpdate(f, width) for _ in range(settings.layers))

    @property
    def sum_degree(self) -> int:
        """Highest degree of the sums over neighbours."""
        return 1

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        scalars, vectors, functions = atoms.scalars, None, self.basis(pairs.distances)
        for message, update in zip(self.messages, self.updates, strict=True):
            change, turn = message(scalars, vectors, functions, pairs)
            scalars, vectors = scalars + change, turn if vectors is None else vectors + turn
            change, turn = update(scalars, vectors)
            scalars, vectors = scalars + change, vectors + turn
        return NodeFeatures(scalars=scalars, vectors=vectors)
