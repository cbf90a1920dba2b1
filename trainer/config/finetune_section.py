"""What the run file says of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from hydrazero.shards.errors import ConfigError, did_you_mean

FULL, HEADS, LORA, LAYERWISE = "full", "heads", "lora", "layerwise"
METHODS = (FULL, HEADS, LORA, LAYERWISE)

NEAREST, MEAN, NEW, OWN = "nearest", "mean", "new", "own"
"""What a task's `init_head` may be beside the name of a head."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSection:
    """Which weights a run that starts from another model changes, and how much."""

    method: str = "full"
    """'full': all; 'heads': those of the heads alone; 'lora': heads, embedding, and low-rank changes of the encoder's
    linear maps, which are part of its weights in an exported model; 'layerwise': all, the slower the farther from the
    heads."""
    rank: int = 8
    """lora: of the changes."""
    layer_decay: float = 0.5
    """layerwise: learning rate of a layer over that of the next one; the embedding is the first, the heads the last."""
    check_units: bool = True
    """Whether the run refuses labels that look as if they were in another unit than what the head predicts that a task
    begins as."""


def check_finetune(settings: FinetuneSection, where: str) -> None:
    """Raise ConfigError for a method that is not known, or a number out of range."""
    if settings.method not in METHODS:
        known = did_you_mean(settings.method, list(METHODS))
        raise ConfigError(f"{where} finetune.method '{settings.method}' is not known{known}.")
    if settings.rank < 1:
        raise ConfigError(f"{where} finetune.rank is {settings.rank}; it must be at least 1.")
    if not 0 < settings.layer_decay <= 1:
        raise ConfigError(f"{where} finetune.layer_decay is {settings.layer_decay}; it must be above 0 and at most 1.")
