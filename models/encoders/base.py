"""What every encoder shares: settings, what it is told of atoms and pairs, and the features that it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hydrazero.models.encoders.radial import BASES, CUTOFFS
from hydrazero.models.ops.slots import Slots
from hydrazero.shards.errors import ConfigError, did_you_mean

MAX_DEGREE = 6
MAX_CORRELATION = 4
SMALLEST_WIDTH = 1e-4
"""Of norms, so that their slope at zero is finite; that of models which do not say theirs."""


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
    max_degree: int = 3
    """Highest degree of the spherical harmonics of pair directions (dimenetpp, mace)."""
    node_degree: int = 1
    """Highest degree of the node features (mace)."""
    correlation: int = 3
    """Most neighbours that one message sees at once, the body order less one (mace)."""
    norm_width: float = 0.1
    """Lengths of node vectors are sqrt(v² + width²) (painn, egnn, pna_eq). At sites of high symmetry vectors vanish; a
    small width makes a kink there, with forces that hardly grow with the displacement, hence wrong phonons."""


@dataclass(frozen=True, kw_only=True)
class AtomInputs:
    """What an encoder is told of A atoms."""

    numbers: Tensor
    """[A] int64; 0 where padded."""
    scalars: Tensor
    """First node features, [A, F]: embeddings of the element and of whatever else conditions the atom."""


@dataclass(frozen=True, kw_only=True)
class PairGeometry:
    """Slots of a batch (R rows of K), and what is measured in them."""

    slots: Slots
    distances: Tensor
    """Å, [R, K]; the cutoff in empty slots, so that nothing divides by zero."""
    directions: Tensor
    """Unit vectors from the row's atom to the neighbour, [R, K, 3]; zero in empty slots."""
    inside: Tensor
    """Cutoff function, [R, K, 1]: 0 at the cutoff and in empty slots. Whatever is summed over slots must carry it."""
    radial: Tensor
    """Radial functions times the cutoff function, and then the cutoff function itself, [R, K, N + 1]."""


@dataclass(frozen=True, kw_only=True)
class NodeFeatures:
    """What an encoder gives for each of A atoms."""

    scalars: Tensor
    """[A, F]."""
    vectors: Tensor | None = None
    """[A, 3, F], where the encoder has them."""


class Encoder(nn.Module):
    """Base of all encoders: radial functions, the measuring of pairs, and how far an atom sees."""

    has_vectors = False
    """Whether the node features hold vectors."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.basis = BASES[settings.radial_basis](settings.radial_functions, settings.cutoff)
        self.cutoff_function = CUTOFFS[settings.cutoff_function]

    @property
    def receptive_radius(self) -> float:
        """Å; atoms farther away than this have no influence on a node's features."""
        return self.settings.cutoff * self.settings.layers

    def measure(self, slots: Slots, vectors: Tensor) -> PairGeometry:
        """Measure pair vectors [R, K, 3] in Å, from each row's atom to its neighbours."""
        cutoff, mask = self.settings.cutoff, slots.mask.unsqueeze(-1)
        # An empty slot gets a vector of the cutoff's length: no root of zero, and the cutoff function makes it 0.
        safe = torch.where(mask, vectors, vectors.new_tensor([cutoff, 0.0, 0.0]))
        distances = torch.sqrt((safe * safe).sum(-1))
        inside = self.cutoff_function(distances, cutoff).unsqueeze(-1) * mask
        return PairGeometry(
            slots=slots,
            distances=distances,
            directions=safe / distances.unsqueeze(-1) * mask,
            inside=inside,
            radial=torch.cat([self.basis(distances) * inside, inside], dim=-1),
        )

    def forward(self, atoms: AtomInputs, pairs: PairGeometry) -> NodeFeatures:
        """Encode atoms."""
        raise NotImplementedError


def check_encoder(settings: EncoderSettings) -> None:
    """Raise ConfigError for an unknown radial basis or cutoff function, or degrees out of range."""
    if not 1 <= settings.node_degree <= settings.max_degree <= MAX_DEGREE:
        raise ConfigError(
            f"model.node_degree = {settings.node_degree} and model.max_degree = {settings.max_degree} must obey "
            f"1 <= node_degree <= max_degree <= {MAX_DEGREE}."
        )
    if not 1 <= settings.correlation <= MAX_CORRELATION:
        raise ConfigError(f"model.correlation is {settings.correlation}; it must be from 1 to {MAX_CORRELATION}.")
    if settings.norm_width < SMALLEST_WIDTH:
        raise ConfigError(f"model.norm_width is {settings.norm_width:g}; it must be {SMALLEST_WIDTH:g} or more.")
    check_known("radial_basis", settings.radial_basis, list(BASES))
    check_known("cutoff_function", settings.cutoff_function, list(CUTOFFS))


def check_known(key: str, name: str, known: list[str]) -> None:
    """Raise ConfigError, with what was probably meant, unless the name is known."""
    if name not in known:
        raise ConfigError(f"model.{key} '{name}' is not known{did_you_mean(name, known)}.")
