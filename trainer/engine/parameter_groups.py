"""Selection of the parameters that are trained, and of those with weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.trainer.engine.zero_layout import full_size

EMBEDDINGS = ("embedding.elements", "embedding.tasks")


def freeze(model: AtomisticModel, patterns: Sequence[str]) -> None:
    """Freeze parameters whose names match a pattern ('encoder.*').

    Raises ConfigError for a pattern that matches none, and if no parameter would be trained.
    """
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
        raise ConfigError("train.freeze freezes every parameter; leave out a pattern, so that something is trained.")


def frozen(module: nn.Module) -> str | None:
    """Return a sentence on the number of frozen parameters; None if all are trained."""
    sizes = [(full_size(parameter), parameter.requires_grad) for parameter in module.parameters()]
    count = sum(size for size, is_trained in sizes if not is_trained)
    return f"frozen: {count:,} of {sum(size for size, _ in sizes):,} parameters." if count else None


def parameter_groups(module: nn.Module, rates: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Return the trained parameters in groups for an optimizer; biases and embeddings have no weight decay.

    Weight decay pulls towards zero, which is no sensible value of an offset, or of the vector of a rare element.
    `rates` are the learning rates of parameters that differ from the optimizer's own, by name. Groups are sorted by
    falling learning rate, with the optimizer's own first; of each rate, the group with weight decay comes first.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            no_decay = name.endswith(("bias", *EMBEDDINGS)) or parameter.dim() < 2
            groups.setdefault((-(rates or {}).get(name, math.inf), no_decay), []).append(parameter)
    return [
        {
            "params": parameters,
            **({"weight_decay": 0.0} if no_decay else {}),
            **({} if math.isinf(negative_rate) else {"lr": -negative_rate}),
        }
        for (negative_rate, no_decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
