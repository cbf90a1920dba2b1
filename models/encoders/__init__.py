"""The encoders by name."""

from __future__ import annotations

from importlib import import_module

from hydrazero.models.encoders.base import Encoder, EncoderSettings, check_known

ENCODERS = {
    "painn": ("painn", "PaiNN"),
    "schnet": ("schnet", "SchNet"),
    "egnn": ("egnn", "EGNN"),
    "pna_eq": ("pna_eq", "PNAEquivariant"),
    "dimenetpp": ("dimenetpp", "DimeNetPlusPlus"),
    "mace": ("mace", "MACE"),
}
"""Name in a run file -> module and class."""


def encoder_class(name: str) -> type[Encoder]:
    """Return an encoder's class; raises ConfigError for an unknown name."""
    check_known("encoder", name, list(ENCODERS))
    module, cls = ENCODERS[name]
    found: type[Encoder] = getattr(import_module(f"hydrazero.models.encoders.{module}"), cls)
    return found


def make_encoder(settings: EncoderSettings) -> Encoder:
    """Build an encoder; raises ConfigError for an unknown encoder, basis or cutoff function."""
    return encoder_class(settings.encoder)(settings)
