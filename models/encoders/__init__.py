"""Encoders, by name.

A built-in encoder is one file here and one line in `ENCODERS`; another package adds one as an entry point in the group
'hydrazero.encoders'. The table of an encoder's sizes stands with the encoder.
"""

from __future__ import annotations

from typing import Any

from hydrazero.models.encoders.base import SIZES, Encoder, EncoderSettings
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.plugins import Registry

ENCODERS: Registry[type[Encoder]] = Registry(
    kind="encoder",
    group="hydrazero.encoders",
    builtin={
        "painn": "hydrazero.models.encoders.painn:PaiNN",
        "schnet": "hydrazero.models.encoders.schnet:SchNet",
        "egnn": "hydrazero.models.encoders.egnn:EGNN",
        "pna_eq": "hydrazero.models.encoders.pna_eq:PNAEquivariant",
        "dimenetpp": "hydrazero.models.encoders.dimenetpp:DimeNetPlusPlus",
        "tensornet": "hydrazero.models.encoders.tensornet:TensorNet",
        "lace": "hydrazero.models.encoders.lace:LACE",
        "mace": "hydrazero.models.encoders.mace:MACE",
    },
    base=Encoder,
)

RADIAL_FUNCTIONS = dict(zip(SIZES, (8, 16, 20, 32), strict=True))
"""Number of radial basis functions of each size, the same for every encoder."""
HEAD_FEATURES = dict(zip(SIZES, (32, 32, 64, 128), strict=True))
"""Width of the heads of each size, the same for every encoder."""

__all__ = ["ENCODERS", "SIZES", "Encoder", "EncoderSettings", "make_encoder", "size_settings"]


def make_encoder(settings: EncoderSettings) -> Encoder:
    """Return an encoder with first weights; raise ConfigError if its name is unknown."""
    return ENCODERS.get(settings.encoder)(settings)


def size_settings(encoder: str, size: str) -> dict[str, Any]:
    """Return the keys of [model] that `size` stands for; raise ConfigError if encoder or size is unknown."""
    sizes = ENCODERS.get(encoder).sizes
    if size not in SIZES:
        raise ConfigError(f"unknown model.size '{size}'{did_you_mean(size, list(SIZES))}.")
    return {"radial_functions": RADIAL_FUNCTIONS[size], "head_features": HEAD_FEATURES[size], **sizes[size]}
