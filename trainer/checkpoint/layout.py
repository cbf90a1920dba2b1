"""How the weights and moments of an engine, or of a checkpoint, are cut.

The optimizer works on flat tensors: under ZeRO 1 and 2 all parameters of a group in a row, of which each rank holds a
share; under ZeRO 3 a part of every parameter; without ZeRO each parameter is one, whole on every rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from hydrazero.trainer.ranks.distributed import ranks


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a parameter lies."""

    flat: int
    """Number of its flat tensor."""
    start: int
    """Of the parameter, or, under ZeRO 3, of every rank's part of it."""
    size: int
    """Numbers in the parameter."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a parameter that a rank holds."""

    flat: int
    start: int
    """In the rank's flat tensor."""
    begin: int
    """In the parameter."""
    size: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How parameters are cut, the same for all ranks."""

    stage: int
    ranks: int
    precision: str
    """Of the weights that the model computes with."""
    places: dict[str, Place]
    shares: tuple[int, ...]
    """ZeRO 1 and 2: what each rank has of each flat tensor."""

    def document(self) -> dict[str, Any]:
        """Return the layout as plain types."""
        return asdict(self)

    def piece(self, name: str, of_rank: int) -> Piece | None:
        """Return what a rank holds of a parameter, None if nothing."""
        place = self.places[name]
        if self.stage == 0:
            return Piece(flat=place.flat, start=0, begin=0, size=place.size)
        if self.stage == 3:
            part = -(-place.size // self.ranks)
            first, last = of_rank * part, min((of_rank + 1) * part, place.size)
            start = place.start
        else:
            share = self.shares[place.flat]
            first = max(of_rank * share - place.start, 0)
            last = min((of_rank + 1) * share - place.start, place.size)
            start = place.start + first - of_rank * share
        return Piece(flat=place.flat, start=start, begin=first, size=last - first) if first < last else None

    def holders(self, name: str, begin: int, end: int) -> range:
        """Ranks that hold [begin, end) of a parameter."""
        place = self.places[name]
        if self.stage == 0:
            return range(1)
        part = -(-place.size // self.ranks) if self.stage == 3 else self.shares[place.flat]
        offset = 0 if self.stage == 3 else place.start
        return range((offset + begin) // part, (offset + end - 1) // part + 1)


def layout_in(document: dict[str, Any]) -> Layout:
    """Return the layout that `document` describes."""
    places = {name: Place(**place) for name, place in document["places"].items()}
    return Layout(**{**document, "places": places, "shares": tuple(document["shares"])})


def layout_of(engine: Any) -> Layout:
    """Return how an engine's parameters are cut."""
    stage, optimizer = int(engine.zero_optimization_stage()), engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    places: dict[str, Place] = {}
    shares: tuple[int, ...] = ()
    if stage == 3:
        for flat, group in enumerate(optimizer.fp16_groups):
            start = 0
            for parameter in group:
                places[names[id(parameter)]] = Place(flat=flat, start=start, size=int(parameter.ds_numel))
                start += parameter.ds_tensor.numel()
    elif stage > 0:
        whole = _flats_of_weights(engine)
        shares = tuple(flat.numel() // ranks() for flat in whole)
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                flat, start = _inside(parameter, whole)
                places[name] = Place(flat=flat, start=start, size=parameter.numel())
    else:
        each = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for flat, parameter in enumerate(each):
            places[names[id(parameter)]] = Place(flat=flat, start=0, size=parameter.numel())
    precision = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
    return Layout(stage=stage, ranks=ranks(), precision=precision, places=places, shares=shares)


def _flats_of_weights(engine: Any) -> list[Tensor]:
    """Flat tensors of all ranks' weights under ZeRO 1 and 2; DeepSpeed has two optimizers for them."""
    optimizer = engine.optimizer
    flats: list[Tensor] = optimizer.bf16_groups_flat if is_bf16(optimizer) else optimizer.bit16_groups_flat
    return flats


def is_bf16(optimizer: Any) -> bool:
    """Whether it is what DeepSpeed takes for bf16 under ZeRO 1, with names of its own."""
    return hasattr(optimizer, "bf16_groups_flat")


def _inside(parameter: Tensor, flats: list[Tensor]) -> tuple[int, int]:
    """Return which flat tensor a parameter is a view of, and where it starts in it."""
    for number, flat in enumerate(flats):
        offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        if offset >= 0 and offset + parameter.numel() <= flat.numel():
            return number, offset
    raise RuntimeError("a parameter lies in none of DeepSpeed's flat tensors.")
