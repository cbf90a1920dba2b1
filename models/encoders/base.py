"""Base class of encoders, with their settings, inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hydrazero.models.encoders.radial import BASES, CUTOFFS
from hydrazero.models.ops.slots import Slots
from hydrazero.shards.settings_parser import Section

SIZES = ("tiny", "small", "base", "large")
"""Names of the sizes of an encoder, by which `size` in a run file chooses."""
MAX_DEGREE = 6
MOST_FEATURES, MOST_LAYERS = 65_536, 256
SMALLEST_CUTOFF, LARGEST_CUTOFF = 0.5, 50.0
"""Range of cutoffs in Å: no two atoms are closer than the first, and the second is beyond any model's memory."""
SMALLEST_WIDTH = 1e-4
"""Smallest width of norms, with which their slope at zero is finite; models without a width of their own have it."""


class EncoderSettings(Section):
    """The encoder of the model: which one, how large, and how far it sees."""

    encoder: str = "painn"
    """Architecture of the encoder: 'schnet', 'painn', 'egnn', 'pna_eq', 'dimenetpp', 'mace', 'tensornet', 'lace', or
    one that an installed package brings."""
    features: Annotated[int, Field(ge=1, le=MOST_FEATURES)] = 128
    """Number of scalar features of each atom, and of vector features where the encoder has them."""
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)] = 3
    """Number of message-passing layers."""
    radial_functions: Annotated[int, Field(ge=1, le=MOST_FEATURES)] = 20
    """Number of radial basis functions."""
    cutoff: Annotated[float, Field(ge=SMALLEST_CUTOFF, le=LARGEST_CUTOFF)] = 5.0
    """Distance in Å up to which two atoms are neighbours, from 0.5 to 50."""
    radial_basis: Literal["sinc", "gaussian"] = "sinc"
    """Radial basis functions: 'sinc' or 'gaussian'."""
    cutoff_function: Literal["cosine", "polynomial"] = "cosine"
    """Function by which messages go to zero at the cutoff: 'cosine' or 'polynomial'."""
    max_degree: int = 3
    """Highest degree of the spherical harmonics of pair directions (dimenetpp, mace, lace); at most 6."""
    node_degree: int = 1
    """Highest degree of the node features (mace, lace)."""
    correlation: Annotated[int, Field(ge=1, le=4)] = 3
    """Largest number of neighbours that one message combines, which is the body order less one (mace, lace)."""
    norm_width: Annotated[float, Field(ge=SMALLEST_WIDTH)] = 0.1
    """Width in the lengths of node vectors, which are sqrt(v² + width²) (painn, egnn, pna_eq). Vectors vanish at sites
    of high symmetry. A small width makes a kink there, with forces that hardly grow with the displacement, and hence
    wrong phonons."""

    @model_validator(mode="after")
    def _check_degrees(self) -> EncoderSettings:
        if not 1 <= self.node_degree <= self.max_degree <= MAX_DEGREE:
            raise ValueError(
                f"node_degree is {self.node_degree} and max_degree is {self.max_degree}; they must obey "
                f"1 <= node_degree <= max_degree <= {MAX_DEGREE}."
            )
        return self


@dataclass(frozen=True, kw_only=True)
class AtomInputs:
    """Inputs of an encoder for A atoms."""

    numbers: Tensor
    """Atomic numbers, [A] int64; 0 for padding."""
    scalars: Tensor
    """Initial node features, [A, F]: embeddings of the element and of the other properties that condition the atom."""


@dataclass(frozen=True, kw_only=True)
class PairGeometry:
    """Slots of a batch (R rows of K slots), and the geometry of the pairs in them."""

    slots: Slots
    distances: Tensor
    """Distances in Å, [R, K]; the cutoff in empty slots, which avoids divisions by zero."""
    directions: Tensor
    """Unit vectors from the row's atom to the neighbour, [R, K, 3]; zero in empty slots."""
    inside: Tensor
    """Cutoff function, [R, K, 1]; 0 at the cutoff and in empty slots. Every sum over slots contains it as a factor."""
    radial: Tensor
    """N radial functions times the cutoff function, followed by the cutoff function itself, [R, K, N + 1]."""


@dataclass(frozen=True, kw_only=True)
class NodeFeatures:
    """Outputs of an encoder for A atoms."""

    scalars: Tensor
    """Scalar features, [A, F]."""
    vectors: Tensor | None = None
    """Vector features, [A, 3, F]; None if the encoder has none."""


def size_table(**settings: tuple[int, int, int, int]) -> dict[str, dict[str, int]]:
    """Return a table size -> settings, from the values of each setting in the order of `SIZES`."""
    return {size: {name: values[place] for name, values in settings.items()} for place, size in enumerate(SIZES)}


class Encoder(nn.Module):
    """Base class of encoders: radial basis functions, geometry of pairs, and the receptive field."""

    has_vectors: ClassVar[bool] = False
    """Whether the node features hold vectors."""
    sizes: ClassVar[dict[str, dict[str, int]]] = size_table(features=(32, 64, 128, 256), layers=(2, 3, 3, 4))
    """Settings that each of `SIZES` stands for; an encoder for which others are better has a table of its own."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.basis = BASES[settings.radial_basis](settings.radial_functions, settings.cutoff)
        self.cutoff_function = CUTOFFS[settings.cutoff_function]

    @property
    def sum_degree(self) -> int | None:
        """Highest degree of the encoder's fused sums over neighbours (`models.ops.pair_sums`); None if it has none."""
        return None

    @property
    def receptive_radius(self) -> float:
        """Distance in Å beyond which atoms have no influence on the features of a node."""
        return self.settings.cutoff * self.settings.layers

    def measure(self, slots: Slots, vectors: Tensor) -> PairGeometry:
        """Return the geometry of pairs with vectors [R, K, 3] in Å, from each row's atom to its neighbours."""
        cutoff, mask = self.settings.cutoff, slots.mask.unsqueeze(-1)
        # In an empty slot a vector of the length of the cutoff avoids the root of zero; the cutoff function is 0 there.
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
        """Return the node features of atoms."""
        raise NotImplementedError
