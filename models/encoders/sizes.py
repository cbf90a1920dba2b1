"""Sizes of encoders by name: what `size` in a run file stands for; single settings beside it win."""

from __future__ import annotations

from typing import Any

from hydrazero.models.encoders import ENCODERS
from hydrazero.models.encoders.base import check_known

SIZES = ("tiny", "small", "base", "large")

_FEATURES: dict[str, tuple[int, int, int, int]] = {
    "painn": (32, 64, 128, 256),
    "schnet": (32, 64, 128, 256),
    "egnn": (32, 64, 128, 256),
    "pna_eq": (32, 64, 128, 256),
    "dimenetpp": (32, 64, 128, 256),
    "mace": (16, 32, 64, 128),
}
_LAYERS: dict[str, tuple[int, int, int, int]] = {
    "painn": (2, 3, 3, 4),
    "schnet": (2, 3, 4, 6),
    "egnn": (2, 3, 4, 5),
    "pna_eq": (2, 3, 3, 4),
    "dimenetpp": (2, 2, 3, 4),
    "mace": (2, 2, 2, 2),
}
_RADIAL = (8, 16, 20, 32)
_HEADS = (32, 32, 64, 128)
_DEGREES: dict[str, tuple[int, int, int, int]] = {"dimenetpp": (2, 3, 4, 6), "mace": (2, 2, 3, 3)}


def size_settings(encoder: str, size: str) -> dict[str, Any]:
    """Return settings of [model] for an encoder and a size; raises ConfigError for one that is not known."""
    check_known("encoder", encoder, list(ENCODERS))
    check_known("size", size, list(SIZES))
    place = SIZES.index(size)
    found: dict[str, Any] = {
        "features": _FEATURES[encoder][place],
        "layers": _LAYERS[encoder][place],
        "radial_functions": _RADIAL[place],
        "head_features": _HEADS[place],
    }
    if encoder in _DEGREES:
        found["max_degree"] = _DEGREES[encoder][place]
    if encoder == "mace":
        found |= {"node_degree": 1, "correlation": 2 if size == "tiny" else 3}
    return found
