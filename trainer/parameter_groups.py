"""Which parameters are trained, and which of them decay."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.shards.errors import ConfigError, did_you_mean

EMBEDDINGS = ("embedding.elements", "embedding.tasks")


def freeze(model: AtomisticModel, patterns: Sequence[str]) -> None:
    """Leave parameters whose names match a pattern ('encoder.*') as they are; raises ConfigError for idle patterns."""
    named = dict(model.named_parameters())
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(
                f"train.freeze: '{pattern}' matches no parameter{did_you_mean(pattern, list(named))}; names are like "
                f"'{next(iter(named))}', and * stands for any part of one."
            )
        for name in matched:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError("train.freeze leaves no parameter to be trained.")


def frozen(module: nn.Module) -> str | None:
    """Say how many parameters are left as they are; None if all are trained."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]  # ZeRO 3 empties them
    held = sum(size for size, is_trained in sizes if not is_trained)
    return f"frozen: {held:,} of {sum(size for size, _ in sizes):,} parameters." if held else None


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters for an optimizer: those that decay, then biases and embeddings, which do not.

    Decay pulls towards zero; that is no sensible place for an offset, or for the vector of a rare element.
    """
    decaying: list[nn.Parameter] = []
    staying: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            stays = name.endswith(("bias", *EMBEDDINGS)) or parameter.dim() < 2
            (staying if stays else decaying).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": staying, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
