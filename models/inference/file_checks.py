"""Checks of model files of any origin: sizes before anything is unpacked or allocated, values before they are used."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from pydantic import NonNegativeInt, PositiveFloat, TypeAdapter
from torch import Tensor

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.model_card import ERROR_UNITS
from hydrazero.shards.errors import ModelFileError
from hydrazero.shards.settings_parser import STRICT, parse_typed
from hydrazero.shards.structure import MAX_MAGNITUDE
from hydrazero.shards.text.foreign_text import escaped
from hydrazero.shards.units import INTERNAL_UNITS

MOST_FACTS = 64 << 20
"""Largest number of bytes of a model's facts, which are 30 kB for a task of 89 elements."""


@dataclass(frozen=True, kw_only=True)
class _CardOfTask:
    """What a card says about a task; see `model_card`."""

    __pydantic_config__ = STRICT

    method: str
    elements: str
    predicts: dict[str, str]
    data: str
    errors: dict[str, float] | None
    untrained: dict[str, str] = field(default_factory=dict)
    undetermined: str = ""


@dataclass(frozen=True, kw_only=True)
class _Card:
    """What a card says; see `model_card`."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}

    hydrazero: str
    created: str
    run: str
    encoder: str
    encoder_package: str = ""
    cutoff: PositiveFloat
    parameters: NonNegativeInt
    dtype: str
    units: dict[str, str]
    error_units: dict[str, str]
    tasks: dict[str, _CardOfTask]
    no_errors: str = ""


_CARD = TypeAdapter(_Card)


def check_card(path: Path, text: str) -> None:
    """Raise ModelFileError unless a JSON text is the card of a model whose results are in our units."""
    card = parse_typed(_CARD, text, f"{path} has a damaged header: card", ModelFileError, hint="export the model again")
    if (card.units, card.error_units) != (INTERNAL_UNITS, ERROR_UNITS):
        raise ModelFileError(f"{path} has a damaged header: its units are {escaped(card.units)}, not {INTERNAL_UNITS}.")
    for name, task in card.tasks.items():
        errors = task.errors
        if errors is not None and not {"structures"} <= errors.keys() <= {"structures", *ERROR_UNITS, *task.predicts}:
            raise ModelFileError(
                f"{path} has a damaged header: the errors of task '{escaped(name)}' are not those of results."
            )


def unpacked_text(packed: str) -> bytes:
    """Return a text of which `base64.b85encode` and `zlib.compress` have made `packed`.

    Raises ValueError or zlib.error if it is damaged, ValueError if it is too long.
    """
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(base64.b85decode(packed), MOST_FACTS)
    if not unpacker.eof:
        raise ValueError(f"its facts are truncated, or longer than {MOST_FACTS:,} bytes")
    return text


def check_shapes(path: Path, expected: AtomisticModel) -> None:
    """Raise ModelFileError unless the tensors in a file are those of a model, which need not have any memory."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(value.shape) for name, value in expected.state_dict().items()}
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise ModelFileError(
                f"{path} contains other weights than its header describes: '{escaped(name)}' is "
                f"{_shape(held.get(name))}, and should be {_shape(wanted.get(name))}; export the model again."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def check_weights(path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise ModelFileError unless all weights are of a type, and none is NaN, infinite or huge."""
    for name, value in weights.items():
        if value.dtype != dtype:
            raise ModelFileError(
                f"{path} contains other weights than its header describes: '{escaped(name)}' is of type "
                f"{value.dtype}, and should be {dtype}; export the model again."
            )
        if not float(value.abs().max()) <= MAX_MAGNITUDE:  # NaN is not, either
            raise ModelFileError(
                f"{path} is damaged: a weight of '{name}' is NaN, infinite or above {MAX_MAGNITUDE:.0e}; export the "
                "model again."
            )
