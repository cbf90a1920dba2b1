"""The model of a run with the weights of one of its checkpoints, without an engine."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hydrazero.models.atomistic import AtomisticModel, model_from_facts
from hydrazero.models.inference.model_file import read_model
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.folders import checkpoint_named, checkpoints, damage, restoring, step_of
from hydrazero.trainer.checkpoint.save_load import read_state
from hydrazero.trainer.checkpoint.zero_files import ZeroFiles
from hydrazero.trainer.engine.low_rank import merged
from hydrazero.trainer.engine.model_with_loss import PREFIX
from hydrazero.trainer.engine.partition import Partition, partition_in
from hydrazero.trainer.engine.weight_average import AVERAGE_NAME
from hydrazero.trainer.ranks.distributed import quiet_deepspeed
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, read_run_json


def model_of_run(run_dir: Path, checkpoint: str = "best", *, averaged: bool = True) -> AtomisticModel:
    """Return the model of a run with the weights of a checkpoint ('best', 'last' or a step), on the CPU.

    The weights are in float32 at least. They are the average of the weights where the run keeps one and `averaged` is
    true. Raises ConfigError for a run or a checkpoint that does not exist, or whose files are damaged.
    """
    facts = read_run_json(run_dir, MODEL_FACTS_NAME)
    folder = checkpoint_named(run_dir, checkpoint)
    if (wrong := damage(folder)) is not None:
        others = ", ".join(str(step_of(each)) for each in checkpoints(run_dir) if each != folder)
        raise ConfigError(f"{wrong}; restore it from a copy, or use another checkpoint ({others or 'none is left'}).")
    model = model_from_facts(facts)
    state = read_state(folder)
    with restoring(folder):
        weights = weights_in(folder, partition_in(state["layout"]))
        if averaged and (folder / AVERAGE_NAME).is_file():
            weights.update(load_file(str(folder / AVERAGE_NAME)))
        weights = merged(weights)
        model = model.to(reduce(torch.promote_types, (value.dtype for value in weights.values()), torch.float32))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{run_dir / MODEL_FACTS_NAME} does not describe the model whose weights {folder} holds; restore it "
            "from a copy."
        ) from error
    return model.eval()


def weights_in(folder: Path, partition: Partition) -> dict[str, Tensor]:
    """Return the weights in a checkpoint's folder, as the optimizer has them, by their names in the model."""
    quiet_deepspeed()  # the files of some optimizers hold objects of DeepSpeed
    return {name.removeprefix(PREFIX): value for name, value in ZeroFiles(folder, partition).weights().items()}


def read_run_or_model(source: str) -> AtomisticModel:
    """Return the model of a run folder's best checkpoint, or an exported model.

    Raises HydrazeroError if `source` is neither.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name a run folder or an exported model.")
    return model_of_run(path) if path.is_dir() else read_model(path)
