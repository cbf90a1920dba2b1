"""The [finetune] section of the run file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from hydrazero.shards.settings_parser import Section

FULL, HEADS, LORA, LAYERWISE = "full", "heads", "lora", "layerwise"
METHODS = (FULL, HEADS, LORA, LAYERWISE)

NEAREST, MEAN, NEW, OWN = "nearest", "mean", "new", "own"
"""Values of a task's `init_head` that are not the name of a head."""


class FinetuneSection(Section):
    """The method of fine-tuning, for a run that starts from another model."""

    method: Literal["full", "heads", "lora", "layerwise"] = "full"
    """Which weights are trained: 'full' trains all of them; 'heads' those of the heads alone; 'lora' the heads, the
    embedding, and low-rank changes of the encoder's linear maps, which become part of its weights in an exported model;
    'layerwise' all of them, with learning rates that fall with the distance from the heads."""
    rank: PositiveInt = 8
    """Rank of the low-rank changes of the method 'lora'."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """For the method 'layerwise': the learning rate of a layer divided by that of the next layer. The embedding is the
    first layer, the heads are the last."""
    check_units: bool = True
    """Whether the run is refused if labels seem to be in another unit than the predictions of the head from which the
    task starts."""
