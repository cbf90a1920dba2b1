"""The weights that each method of fine-tuning trains, and their learning rates."""

from __future__ import annotations

from collections.abc import Iterable

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.model_file import STACKED
from hydrazero.trainer.config.finetune_section import HEADS, LAYERWISE, LORA, FinetuneSection
from hydrazero.trainer.engine.low_rank import add_low_rank_changes

EMBEDDING = "embedding."
ENCODER = "encoder."


def prepare(model: AtomisticModel, settings: FinetuneSection) -> None:
    """Set which parameters of a model are trained, once it has the weights that it starts with.

    With low-rank changes the embedding is trained too; only the rows of elements that occur in structures change.
    """
    if settings.method == HEADS:
        for name, parameter in model.named_parameters():
            if name.startswith((ENCODER, EMBEDDING)):
                parameter.requires_grad_(False)
    if settings.method == LORA:
        add_low_rank_changes(model.encoder, settings.rank)


def rate_factors(names: Iterable[str], settings: FinetuneSection) -> dict[str, float]:
    """Return the learning rate of each parameter of a model divided by that of the heads, by name.

    The method 'layerwise' is discriminative fine-tuning (Howard, Ruder 2018, arXiv 1801.06146, sec. 3.2): each layer of
    the encoder has `layer_decay` times the rate of the next one, and the embedding counts as a layer before the first.
    """
    names = list(names)
    if settings.method != LAYERWISE:
        return dict.fromkeys(names, 1.0)
    layers = 1 + max((_layer(name) for name in names if name.startswith(ENCODER)), default=0)
    factors = {}
    for name in names:
        away = 0
        if name.startswith(ENCODER):
            away = layers - _layer(name)
        elif name.startswith(EMBEDDING) and not name.startswith(STACKED):
            away = layers + 1
        factors[name] = settings.layer_decay**away
    return factors


def _layer(name: str) -> int:
    """Return the number of the encoder layer of a parameter; parameters outside the list of layers count as layer 0."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
