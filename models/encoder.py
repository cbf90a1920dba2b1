"""What every encoder shares: its settings, the geometry of pairs in slots, and the features that it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hydrazero.models.slots import Slots
from hydrazero.shards.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Size and shape of an encoder."""

    encoder: str = "painn"
    features: int = 128
    """Scalar features per atom, and vector features per atom where the encoder has them."""
    layers: int = 3
    """Message-passing steps."""
    radial_functions: int = 20
    cutoff: float = 5.0
    """Å."""
    radial_basis: str = "sinc"
    """'sinc' or 'gaussian'."""
    cutoff_function: str = "cosine"
    """'cosine' or 'polynomial'."""


@dataclass(frozen=True, kw_only=True)
class NodeFeatures:
    """What an encoder gives for each of A atoms."""

    scalars: Tensor
    """[A, F]."""
    vectors: Tensor | None = None
    """[A, 3, F], where the encoder has them."""


@dataclass(frozen=True, kw_only=True)
class PairGeometry:
    """Slots of a batch, and what is measured in them."""

    slots: Slots
    directions: Tensor = field(default_factory=lambda: torch.empty(0))
    """Unit vectors from receiver to neighbour, [R, K, 3]; zero in empty slots."""
    radial: Tensor = field(default_factory=lambda: torch.empty(0))
    """Radial functions times the cutoff function, and the cutoff function itself: [R, K, N + 1]; zero if empty."""

    def measured(
        self,
        vectors: Tensor,
        cutoff: float,
        basis: Callable[[Tensor], Tensor],
        cutoff_function: Callable[[Tensor, float], Tensor],
    ) -> PairGeometry:
        """Return a copy with directions and radial functions of the pair vectors [R, K, 3] in Å."""
        # An empty slot gets a vector of the cutoff's length: no root of zero, and the cutoff function makes it 0.
        away = vectors.new_tensor([cutoff, 0.0, 0.0])
        safe = torch.where(self.slots.mask.unsqueeze(-1), vectors, away)
        distance = torch.sqrt((safe * safe).sum(-1))
        inside = (cutoff_function(distance, cutoff) * self.slots.mask).unsqueeze(-1)
        radial = torch.cat([basis(distance) * inside, inside], dim=-1)
        directions = safe / distance.unsqueeze(-1) * self.slots.mask.unsqueeze(-1)
        return replace(self, directions=directions, radial=radial)


def make_encoder(settings: EncoderSettings) -> torch.nn.Module:
    """Build an encoder by its name; raises ConfigError for an unknown encoder, basis or cutoff function."""
    from hydrazero.models.painn import PaiNN
    from hydrazero.models.radial import BASES, CUTOFFS

    encoders = {"painn": PaiNN}
    for kind, name, known in (
        ("encoder", settings.encoder, list(encoders)),
        ("radial_basis", settings.radial_basis, list(BASES)),
        ("cutoff_function", settings.cutoff_function, list(CUTOFFS)),
    ):
        if name not in known:
            raise ConfigError(f"model.{kind} '{name}' is not known{did_you_mean(name, known)}.")
    return encoders[settings.encoder](settings)
