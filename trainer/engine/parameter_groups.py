"""Which parameters are trained, and which of them decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def parameter_groups(module: nn.Module, rates: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Return the trained parameters for an optimizer: those that decay, then biases and embeddings, which do not.

    Decay pulls towards zero; that is no sensible place for an offset, or for the vector of a rare element. `rates` are
    the learning rates of parameters that have not the optimizer's own, by name; groups of the highest come first.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            stays = name.endswith(("bias", *EMBEDDINGS)) or parameter.dim() < 2
            groups.setdefault((-(rates or {}).get(name, math.inf), stays), []).append(parameter)
    return [
        {
            "params": parameters,
            **({"weight_decay": 0.0} if stays else {}),
            **({} if math.isinf(slowness) else {"lr": -slowness}),
        }
        for (slowness, stays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
