"""The model of a run, out of its checkpoints, without an engine."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hydrazero.models.atomistic import AtomisticModel, model_from_facts
from hydrazero.trainer.checkpoint_files import checkpoint_named
from hydrazero.trainer.distributed import quiet_deepspeed
from hydrazero.trainer.run_files import MODEL_FACTS_NAME, read_json
from hydrazero.trainer.trained_model import PREFIX
from hydrazero.trainer.weight_average import AVERAGE_NAME


def model_of_run(run_dir: Path, checkpoint: str = "best", *, averaged: bool = True) -> AtomisticModel:
    """Build the model of a run with the weights of a checkpoint ('best', 'last' or a step), on the CPU.

    With the average of the weights where the run keeps one, unless it is not wanted. Raises ConfigError for a run or a
    checkpoint that is not there.
    """
    folder = checkpoint_named(run_dir, checkpoint)
    model = model_from_facts(read_json(run_dir / MODEL_FACTS_NAME))
    weights = last_weights(folder)
    if averaged and (folder / AVERAGE_NAME).is_file():
        weights.update(load_file(str(folder / AVERAGE_NAME)))
    model = model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def last_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, in float32 where they were sharded, by the model's names."""
    whole = folder / "mp_rank_00_model_states.pt"  # under ZeRO 3 no rank has it
    weights = torch.load(whole, map_location="cpu", weights_only=False)["module"] if whole.is_file() else {}
    if any(folder.glob("*zero_pp_rank_*_optim_states.pt")):
        weights = {**weights, **_consolidated(folder)}  # which has no weights that are not trained
    return {name.removeprefix(PREFIX): value for name, value in weights.items()}


def _consolidated(folder: Path) -> dict[str, Tensor]:
    """Join the ranks' parts of a ZeRO checkpoint into float32 weights."""
    quiet_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints its progress, which is over in a moment, on both channels.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))
