"""SchNet: continuous-filter convolutions (Schütt et al. 2018, J. Chem. Phys. 148, 241722)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry, size_table
from hydrazero.models.ops.exact import ExactLinear


def shifted_softplus(x: Tensor) -> Tensor:
    """Return ln(e^x / 2 + 1 / 2), which is 0 at x = 0 (paper, sec. II B)."""
    return functional.softplus(x) - math.log(2.0)


class SchNetInteraction(nn.Module):
    """Interaction block: neighbours' features times filters of the distance, then atom-wise layers (paper, fig. 2)."""

    def __init__(self, features: int, radial_functions: int) -> None:
        super().__init__()
        self.filter_in = ExactLinear(radial_functions, features)
        self.filter_out = nn.Linear(features, features)
        self.before = nn.Linear(features, features, bias=False)
        self.after = nn.Linear(features, features)
        self.out = nn.Linear(features, features)

    def forward(self, scalars: Tensor, functions: Tensor, pairs: PairGeometry) -> Tensor:
        """Return the change of the scalars [A, F]; radial functions are [R, K, N]."""
        filters = self.filter_out(shifted_softplus(self.filter_in(functions))) * pairs.inside
        gathered = (filters * pairs.slots.gather(self.before(scalars))).sum(1)
        change: Tensor = self.out(shifted_softplus(self.after(pairs.slots.sum_rows(gathered))))
        return change


class SchNet(Encoder):
    """SchNet encoder, which has scalars only."""

    sizes = size_table(features=(32, 64, 128, 256), layers=(2, 3, 4, 6))

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        self.interactions = nn.ModuleList(
            SchNetInteraction(settings.features, settings.radial_functions) for _ in range(settings.layers)
        )

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        scalars, functions = atoms.scalars, self.basis(pairs.distances)
        for interaction in self.interactions:
            scalars = scalars + interaction(scalars, functions, pairs)
        return NodeFeatures(scalars=scalars)
