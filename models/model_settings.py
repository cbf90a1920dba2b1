"""Settings of a model, and which of them go together with which tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from hydrazero.models.encoders import ENCODERS
from hydrazero.models.encoders.base import MOST_FEATURES, MOST_LAYERS, EncoderSettings
from hydrazero.models.heads.heads import HeadSize
from hydrazero.models.heads.target_heads import check_attention
from hydrazero.models.task_facts import CONSERVATIVE, DIRECT, TaskFacts, targets_of
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.settings_parser import ListOf, Section


class HeadSettings(Section):
    """The heads of the model, and settings of the model as a whole."""

    head_features: Annotated[int, Field(ge=1, le=MOST_FEATURES)] = 64
    """Width of the hidden layers of each head."""
    head_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)] = 1
    """Number of hidden layers of each head."""
    ensemble: Annotated[int, Field(ge=1, le=MOST_FEATURES)] = 1
    """Number of energies that each head predicts. With more than one, their mean is the prediction and their spread is
    its uncertainty."""
    repulsion: Literal["none", "zbl"] = "none"
    """'zbl' adds the screened repulsion of nuclei at short range (Ziegler, Biersack, Littmark) to every energy; 'none'
    does not."""
    task_embedding: bool = False
    """Whether the task is an input of the encoder's first layer, not of the heads alone."""
    attention_targets: ListOf[str] = ()
    """Names of intensive targets whose mean over atoms is weighted by attention."""


class ModelSettings(HeadSettings):
    """Everything that is needed to build a model, except for its tasks."""

    encoder: EncoderSettings = EncoderSettings()

    def head_size(self, tasks: int) -> HeadSize:
        """Return the size of the heads of a number of tasks."""
        features = self.encoder.features
        return HeadSize(tasks=tasks, features=features, hidden=self.head_features, layers=self.head_layers)


def check_model(settings: ModelSettings, tasks: Sequence[TaskFacts]) -> None:
    """Raise ConfigError for an unknown encoder, or for heads that the encoder or a task does not support."""
    check_attention(targets_of(tasks), settings.attention_targets)
    encoder = settings.encoder.encoder
    has_vectors = ENCODERS.get(encoder).has_vectors
    for task in tasks:
        if {task.forces, task.stress} == {CONSERVATIVE, DIRECT}:
            raise ConfigError(
                f"task '{task.name}' mixes {task.forces} forces with {task.stress} stress, which "
                "would not belong to the same energy; choose one way for both."
            )
        if CONSERVATIVE in (task.forces, task.stress) and not task.has_energy:
            raise ConfigError(
                f"task '{task.name}' has no energies, so its forces cannot be their gradient; set forces = 'direct' "
                "or 'none' for it."
            )
        wants = [way for way in ("forces", "stress") if getattr(task, way) == DIRECT]
        wants += [name for name, facts in task.targets.items() if facts.kind == "vector"]
        if wants and not has_vectors:
            raise ConfigError(
                f"task '{task.name}' needs vectors for {', '.join(wants)}, but the encoder '{encoder}' has none; "
                f"choose one of {', '.join(name for name in ENCODERS.builtin if ENCODERS.get(name).has_vectors)}."
            )
        if settings.repulsion != "none" and DIRECT in (task.forces, task.stress):
            raise ConfigError(
                f"task '{task.name}' has direct forces, which model.repulsion = '{settings.repulsion}' does not "
                "affect; make them conservative, or leave the repulsion out."
            )
