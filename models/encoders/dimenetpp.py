"""DimeNet++: directional messages (Gasteiger et al. 2020, arXiv 2003.03123 and 2011.14115), without lists of triplets.

A message from j to i depends on those from k to j, weighted by the distance r_kj and the angle between j-k and j-i.
With the addition theorem, P_l(cos) = sum_m Y_lm(j-k) Y_lm(j-i), so that the sum over k of a weight g_l(r_kj) P_l(cos)
x_kj is a density B_lm = sum_k Y_lm g_l x_kj around j, evaluated in the direction of i: exact, and linear in the
number of pairs. The term k = i, which the papers leave out, has cos = 1 and is subtracted. The radial functions are
the same for each l, where the papers have Bessel functions of order l.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import AtomInputs, Encoder, EncoderSettings, NodeFeatures, PairGeometry, size_table
from hydrazero.models.encoders.harmonics import solid_harmonics
from hydrazero.models.ops.exact import ExactLinear, exact_matmul

RADIAL_GAIN = 3.0
"""Initial gain of weights of radial functions, which brings them to about one at the length of a bond."""
OUTPUT_GAIN = 0.3
"""Initial gain of a block's output, which keeps sums over neighbours below the initial node scalars."""


def dense(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Linear layer whose first weights keep the size of its input; with those of PyTorch, angles hardly contribute."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def radial_weights(radial_functions: int, outputs: int, gain: float = RADIAL_GAIN) -> ExactLinear:
    """Weights that depend on the distance alone and vanish with the cutoff function."""
    layer = ExactLinear(radial_functions + 1, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain / (radial_functions + 1) ** 0.5)
    return layer


class Residual(nn.Module):
    """Residual layer x + silu(W silu(V x))."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second = dense(features, features), dense(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., F] for inputs [..., F]."""
        return x + functional.silu(self.second(functional.silu(self.first(x))))


class DirectionalInteraction(nn.Module):
    """Interaction block: each message is updated by those that end where it begins (2011.14115, fig. 1)."""

    def __init__(self, features: int, radial_functions: int, degree: int) -> None:
        super().__init__()
        self.degree, self.inner = degree, max(features // 2, 1)
        self.own = dense(features, features)
        self.incoming = dense(features, features)
        self.distance = radial_weights(radial_functions, features)
        self.down = dense(features, self.inner, bias=False)
        self.angular = radial_weights(radial_functions, (degree + 1) * self.inner)
        self.up = dense(self.inner, features, bias=False)
        self.before = Residual(features)
        self.skip = dense(features, features)
        self.after = nn.ModuleList(Residual(features) for _ in range(2))

    def forward(self, messages: Tensor, harmonics: Tensor, pairs: PairGeometry) -> Tensor:
        """Return new messages from messages [R, K, F] in the slots of the atoms where they end, and harmonics."""
        incoming = functional.silu(self.incoming(messages)) * self.distance(pairs.radial)
        incoming = functional.silu(self.down(incoming))
        found = self.up(pairs.slots.opposite(self.around(incoming, harmonics, pairs)))
        changed = functional.silu(self.own(messages)) + functional.silu(found)
        messages = messages + functional.silu(self.skip(self.before(changed)))
        for residual in self.after:
            messages = residual(messages)
        return messages

    def around(self, incoming: Tensor, harmonics: Tensor, pairs: PairGeometry) -> Tensor:
        """Return for each slot of atom j the sum over its other slots k of sum_l g_l(r_jk) P_l(cos) x_k, [R, K, I]."""
        slots = pairs.slots
        weights = self.angular(pairs.radial).unflatten(-1, (self.degree + 1, self.inner))
        # Split instead of sliced, since the derivative of a slice fills a tensor with zeros.
        parts = harmonics.split([2 * l + 1 for l in range(self.degree + 1)], dim=-1)  # noqa: E741
        densities = [
            exact_matmul(part.transpose(1, 2), weight * incoming)
            for part, weight in zip(parts, weights.unbind(2), strict=True)
        ]
        density = slots.spread(slots.sum_rows(torch.cat(densities, dim=1)))
        return exact_matmul(harmonics, density) - weights.sum(2) * incoming


class DirectionalOutput(nn.Module):
    """Output block: node scalars from the messages that end at an atom, weighted by distance."""

    def __init__(self, features: int, radial_functions: int) -> None:
        super().__init__()
        self.distance = radial_weights(radial_functions, features, OUTPUT_GAIN)
        self.first, self.second = nn.Linear(features, features), nn.Linear(features, features)

    def forward(self, messages: Tensor, pairs: PairGeometry) -> Tensor:
        """Return node scalars [A, F] from messages [R, K, F]."""
        summed = pairs.slots.sum_rows((messages * self.distance(pairs.radial)).sum(1))
        out: Tensor = self.second(functional.silu(self.first(summed)))
        return out


class DimeNetPlusPlus(Encoder):
    """DimeNet++ encoder; its node scalars are sums over the outputs of all blocks."""

    sizes = size_table(features=(32, 64, 128, 256), layers=(2, 2, 3, 4), max_degree=(2, 3, 4, 6))

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        f, n = settings.features, settings.radial_functions
        self.distance = radial_weights(n, f)
        self.own, self.other = dense(f, f), dense(f, f, bias=False)
        self.third = dense(f, f, bias=False)
        self.interactions = nn.ModuleList(
            DirectionalInteraction(f, n, settings.max_degree) for _ in range(settings.layers)
        )
        self.outputs = nn.ModuleList(DirectionalOutput(f, n) for _ in range(settings.layers + 1))

    @property
    def receptive_radius(self) -> float:
        """Distance in Å beyond which atoms have no influence; messages begin one neighbour farther away than nodes."""
        return self.settings.cutoff * (self.settings.layers + 1)

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Return the node features of atoms."""
        slots = pairs.slots
        harmonics = solid_harmonics(pairs.directions, self.settings.max_degree)
        # The embedding of both atoms and the distance is split, so that the parts of the atoms are computed per atom.
        messages = slots.gather(self.other(atoms.scalars)) + slots.spread(self.own(atoms.scalars)).unsqueeze(1)
        messages = functional.silu(messages + self.third(functional.silu(self.distance(pairs.radial))))
        scalars = atoms.scalars + self.outputs[0](messages, pairs)
        for interaction, output in zip(self.interactions, list(self.outputs)[1:], strict=True):
            messages = interaction(messages, harmonics, pairs)
            scalars = scalars + output(messages, pairs)
        return NodeFeatures(scalars=scalars)
