"""Weights that a run starts with, taken from another run or an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.inference.model_file import STACKED
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.model_of_run import read_run_or_model

NEW_CONDITIONS = ("embedding.charge_spin.2.weight", "embedding.charge_spin.2.bias")
"""Last layer of the embedding of charge and spin; zero where the source has none, so that it changes nothing yet."""


def model_to_start_from(source: str, settings: EncoderSettings) -> AtomisticModel:
    """Return the model of a run folder's best checkpoint, or an exported model.

    Raises HydrazeroError if `source` is neither, or if its encoder differs from the one that `settings` describe.
    """
    if not Path(source).exists():
        raise ConfigError(f"run.start_from: {source} does not exist; name a run folder or an exported model.")
    model = read_run_or_model(source)
    there, here = vars(model.settings.encoder), vars(settings)
    if there != here:
        said = ", ".join(f"model.{name} = {value!r}" for name, value in there.items() if value != here[name])
        raise ConfigError(f"run.start_from: the encoder of {source} has {said}; set the same, or leave it out.")
    return model


def rows_of_same_name(model_tasks: Sequence[str], source: AtomisticModel) -> dict[int, tuple[int, ...]]:
    """Return the row of the source's head of the same name, for each task (by index) that has one."""
    names = [task.name for task in source.tasks]
    return {index: (names.index(name),) for index, name in enumerate(model_tasks) if name in names}


def start_from(model: AtomisticModel, source: AtomisticModel, rows: Mapping[int, Sequence[int]]) -> None:
    """Copy encoder and embedding, and the heads that fit: each task's head is the mean of the source's heads at `rows`.

    Parts that the source does not have (a head of direct forces, for example, where the source takes gradients) keep
    their random weights.
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
