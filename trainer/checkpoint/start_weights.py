"""Weights that a run starts with: those of another run, or of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.inference.model_file import STACKED, read_model
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.model_of_run import model_of_run

NEW_CONDITIONS = ("embedding.charge_spin.2.weight", "embedding.charge_spin.2.bias")
"""Last layer of what tells charge and spin; zero where the start had none, so that it changes nothing at first."""


def model_to_start_from(source: str, settings: EncoderSettings) -> AtomisticModel:
    """Read a run folder's best checkpoint or an exported model.

    Raises HydrazeroError if it is neither, or if its encoder is not what `settings` make.
    """
    model = read_start(source)
    there, here = vars(model.settings.encoder), vars(settings)
    if there != here:
        said = ", ".join(f"model.{name} = {value!r}" for name, value in there.items() if value != here[name])
        raise ConfigError(f"run.start_from: the encoder of {source} has {said}; set the same, or leave it out.")
    return model


def read_start(source: str) -> AtomisticModel:
    """Read a run folder's best checkpoint or an exported model; raises HydrazeroError if it is neither."""
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"run.start_from: {path} does not exist; name a run folder or an exported model.")
    return model_of_run(path) if path.is_dir() else read_model(path)


def rows_of_same_name(model_tasks: Sequence[str], source: AtomisticModel) -> dict[int, tuple[int, ...]]:
    """Return, for each task that the source has a head of the same name for, that head's row."""
    names = [task.name for task in source.tasks]
    return {index: (names.index(name),) for index, name in enumerate(model_tasks) if name in names}


def start_from(model: AtomisticModel, source: AtomisticModel, rows: Mapping[int, Sequence[int]]) -> None:
    """Copy encoder and embedding, and what fits of heads: each task's is the mean of the source's heads at its `rows`.

    What only one of the two has (a head of direct forces, say, where the other takes gradients) keeps its first
    weights.
    """
    stored = source.state_dict()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key not in stored:
                if key in NEW_CONDITIONS:
                    value.zero_()
            elif not key.startswith(STACKED):
                value.copy_(stored[key])
            elif stored[key].shape[1:] == value.shape[1:]:
                for row, others in rows.items():
                    if others:
                        value[row] = stored[key][list(others)].mean(0)
