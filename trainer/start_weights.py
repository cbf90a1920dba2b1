"""Weights that a run starts with: those of another run, or of an exported model."""

from __future__ import annotations

from pathlib import Path

import torch

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoder import EncoderSettings
from hydrazero.models.model_file import STACKED, read_model
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.config import RunConfig
from hydrazero.trainer.trained_weights import model_of_run


def model_to_start_from(source: str, settings: EncoderSettings) -> AtomisticModel:
    """Read a run folder's best checkpoint or an exported model.

    Raises HydrazeroError if it is neither, or if its encoder is not what `settings` make.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"run.start_from: {path} does not exist; name a run folder or an exported model.")
    model = model_of_run(path) if path.is_dir() else read_model(path)
    there, here = vars(model.settings.encoder), vars(settings)
    if there != here:
        said = ", ".join(f"model.{name} = {value!r}" for name, value in there.items() if value != here[name])
        raise ConfigError(f"run.start_from: the encoder of {path} has {said}; set the same, or leave it out.")
    return model


def started_from(config: RunConfig, source: AtomisticModel) -> str:
    """Return a sentence on it for the log."""
    own = {task.name for task in config.tasks}
    names = [task.name for task in source.tasks if task.name in own]
    return f"started from {config.run.start_from}, with its heads of {', '.join(names) or 'no task'}."


def start_from(model: AtomisticModel, source: AtomisticModel) -> None:
    """Copy encoder and embedding, and what fits of the heads of tasks of the same name.

    What only one of the two has (a head of direct forces, say, where the other takes gradients) keeps its first
    weights.
    """
    names = [task.name for task in source.tasks]
    rows = {index: names.index(task.name) for index, task in enumerate(model.tasks) if task.name in names}
    stored = source.state_dict()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key not in stored:
                continue
            if not key.startswith(STACKED):
                value.copy_(stored[key])
            elif stored[key].shape[1:] == value.shape[1:]:
                for row, other in rows.items():
                    value[row] = stored[key][other]
