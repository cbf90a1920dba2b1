"""How the weights and moments of an optimizer are partitioned over ranks.

The optimizer works on flat tensors. Under ZeRO 1 and 2, all parameters of a group follow each other in one flat tensor,
of which each rank holds a share; under ZeRO 3, each rank holds a part of every parameter; without ZeRO, each parameter
is a flat tensor of its own, and every rank holds all of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ParameterPlace:
    """The place of a parameter among the flat tensors."""

    flat: int
    """Number of its flat tensor."""
    start: int
    """Offset of the parameter in the flat tensor of all ranks; under ZeRO 3, of each rank's part in its own tensor."""
    size: int
    """Number of elements of the parameter."""


@dataclass(frozen=True, kw_only=True)
class ParameterPart:
    """The part of a parameter that one rank holds."""

    flat: int
    """Number of its flat tensor."""
    start: int
    """Offset of the part in the rank's flat tensor."""
    begin: int
    """Offset of the part in the parameter."""
    size: int
    """Number of elements of the part."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The partition of all parameters; the same on all ranks."""

    stage: int
    """ZeRO stage."""
    ranks: int
    """Number of ranks."""
    precision: str
    """Type of the weights that the model computes with, such as 'float32'."""
    places: dict[str, ParameterPlace]
    """Place of each trained parameter, by the parameter's name."""
    shares: tuple[int, ...]
    """ZeRO 1 and 2: the number of elements of each flat tensor that every rank holds."""

    def document(self) -> dict[str, Any]:
        """Return the partition as plain types, for a checkpoint."""
        return asdict(self)

    def part(self, name: str, of_rank: int) -> ParameterPart | None:
        """Return the part of a parameter that a rank holds; None if it holds nothing of it."""
        place = self.places[name]
        if self.stage == 0:
            return ParameterPart(flat=place.flat, start=0, begin=0, size=place.size)
        if self.stage == 3:
            share = -(-place.size // self.ranks)
            first, last = of_rank * share, min((of_rank + 1) * share, place.size)
            start = place.start
        else:
            share = self.shares[place.flat]
            first = max(of_rank * share - place.start, 0)
            last = min((of_rank + 1) * share - place.start, place.size)
            start = place.start + first - of_rank * share
        return ParameterPart(flat=place.flat, start=start, begin=first, size=last - first) if first < last else None

    def holders(self, name: str, begin: int, end: int) -> range:
        """Return the ranks that hold the elements [begin, end) of a parameter; rank 0 stands for all without ZeRO."""
        place = self.places[name]
        if self.stage == 0:
            return range(1)
        share = -(-place.size // self.ranks) if self.stage == 3 else self.shares[place.flat]
        offset = 0 if self.stage == 3 else place.start
        return range((offset + begin) // share, (offset + end - 1) // share + 1)


def partition_in(document: dict[str, Any]) -> Partition:
    """Return the partition that a checkpoint's document describes."""
    places = {name: ParameterPlace(**place) for name, place in document["places"].items()}
    return Partition(**{**document, "places": places, "shares": tuple(document["shares"])})
