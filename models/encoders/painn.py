"""PaiNN: the polarizable atom interaction network (Schütt, Unke, Gastegger 2021, arXiv 2102.03150)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry
from hydrazero.models.encoders.degree_features import uniform_filters
from hydrazero.models.ops.pair_sums import PairFactors, Path, pair_sum


class PaiNNMessage(nn.Module):
    """Message block: sums of neighbours' scalars and vectors, filtered by distance (paper, eqs. 7 and 8)."""

    def __init__(self, features: int, radial_functions: int) -> None:
        super().__init__()
        self.features = features
        self.context_in = nn.Linear(features, features)
        self.context_out = nn.Linear(features, 3 * features)
        self.filter = uniform_filters(radial_functions, 3 * features)

    def forward(self, scalars: Tensor, vectors: Tensor | None, pairs: PairGeometry) -> tuple[Tensor, Tensor]:
        """Return the changes of scalars [A, F] and vectors [A, 3, F] (None means zero)."""
        f, weight, bias = self.features, self.context_out.weight, self.context_out.bias
        hidden = functional.silu(self.context_in(scalars))
        both = functional.linear(hidden, weight[: 2 * f], bias[: 2 * f]).unflatten(-1, (2, f))
        tensors, for_tensors = both[:, :1], self.filter[:, :f]
        if vectors is not None:
            # Gates and vectors both belong to the neighbour, so they are multiplied before they are gathered.
            gated = functional.linear(hidden, weight[2 * f :], bias[2 * f :]).unsqueeze(1) * vectors
            tensors, for_tensors = torch.cat([tensors, gated], dim=1), self.filter[:, : 2 * f]
        summed = pair_sum(
            PairFactors(slots=pairs.slots, radial=pairs.radial, harmonics=pairs.directions),
            Path(features=tensors, weight=for_tensors),
            Path(features=both[:, 1:], weight=self.filter[:, 2 * f :]),
        )
        return summed[:, 0], summed[:, 1:]


class PaiNNUpdate(nn.Module):
    """Update block, in which scalars and vectors of an atom exchange information (paper, eqs. 9 and 10)."""

    def __init__(self, features: int, norm_width: float) -> None:
        super().__init__()
        self.features, self.norm_width = features, norm_width
        self.mix = nn.Linear(features, 2 * features, bias=False)
        self.gates_in = nn.Linear(2 * features, features)
        self.gates_out = nn.Linear(features, 3 * features)

    def forward(self, scalars: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changes of scalars [A, F] and vectors [A, 3, F]."""
        f, weight, bias = self.features, self.gates_out.weight, self.gates_out.bias
        u, v = self.mix(vectors).split(f, dim=-1)
        norm = torch.sqrt((v * v).sum(1) + self.norm_width**2)
        hidden = functional.silu(self.gates_in(torch.cat([scalars, norm], dim=-1)))
        for_product, for_scalars = functional.linear(hidden, weight[: 2 * f], bias[: 2 * f]).split(f, dim=-1)
        # A separate product, which a compiled step leaves out where nobody uses the last vectors.
        for_vectors = functional.linear(hidden, weight[2 * f :], bias[2 * f :])
        return for_scalars + for_product * (u * v).sum(1), for_vectors.unsqueeze(1) * u


class PaiNN(Encoder):
    """PaiNN encoder: blocks of message and update on scalars and vectors."""

    has_vectors = True

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        f = settings.features
        self.messages = nn.ModuleList(PaiNNMessage(f, settings.radial_functions) for _ in range(settings.layers))
        self.updates = nn.ModuleList(PaiNNUpdate(f, settings.norm_width) for _ in range(settings.layers))

    @property
    def sum_degree(self) -> int:
        """Highest degree of the sums over neighbours."""
        return 1

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        scalars, vectors = atoms.scalars, None
        for message, update in zip(self.messages, self.updates, strict=True):
            change, turn = message(scalars, vectors, pairs)
            # A part of the sums as it is would be multiplied by weights atom by atom, which is three times as slow.
            scalars, vectors = scalars + change, turn.contiguous() if vectors is None else vectors + turn
            change, turn = update(scalars, vectors)
            scalars, vectors = scalars + change, vectors + turn
        return NodeFeatures(scalars=scalars, vectors=vectors)
