"""The model of a run, out of its checkpoints, without an engine."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hydrazero.models.atomistic import AtomisticModel, model_from_facts
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.folders import checkpoint_named, checkpoints, damage, step_of
from hydrazero.trainer.engine.low_rank import merged
from hydrazero.trainer.engine.training_step import PREFIX
from hydrazero.trainer.engine.weight_average import AVERAGE_NAME
from hydrazero.trainer.ranks.distributed import quiet_deepspeed
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, read_json


def model_of_run(run_dir: Path, checkpoint: str = "best", *, averaged: bool = True) -> AtomisticModel:
    """Build the model of a run with the weights of a checkpoint ('best', 'last' or a step), on the CPU.

    In float32 at least, and with the average of the weights where the run keeps one, unless it is not wanted. Raises
    ConfigError for a run or a checkpoint that is not there, or whose files are not what was written.
    """
    facts = read_json(run_dir / MODEL_FACTS_NAME)
    folder = checkpoint_named(run_dir, checkpoint)
    if (wrong := damage(folder)) is not None:
        others = ", ".join(str(step_of(each)) for each in checkpoints(run_dir) if each != folder)
        raise ConfigError(f"{wrong}; bring it back from a copy, or use another one ({others or 'none is left'}).")
    model = model_from_facts(facts)
    weights = last_weights(folder)
    if averaged and (folder / AVERAGE_NAME).is_file():
        weights.update(load_file(str(folder / AVERAGE_NAME)))
    weights = merged(weights)
    model = model.to(reduce(torch.promote_types, (value.dtype for value in weights.values()), torch.float32))
    model.load_state_dict(weights, strict=True)
    return model.eval()


def last_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, those that the optimizer steps where it has its own, by the model's names."""
    quiet_deepspeed()  # files of optimizers hold objects of its
    whole = folder / "mp_rank_00_model_states.pt"  # under ZeRO 3 no rank has it
    weights = _load(whole)["module"] if whole.is_file() else {}
    files = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=_rank_of)
    if files and "zero_stage" in _load(files[0])["optimizer_state_dict"]:
        weights |= _consolidated(folder)  # which has no weights that are not trained
    else:
        weights |= _of_bf16(files, {name: value.shape for name, value in weights.items()})
    return {name.removeprefix(PREFIX): value for name, value in weights.items()}


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)


def _rank_of(file: Path) -> int:
    return int(file.name.split("_pp_rank_")[1].split("_")[0])


def _of_bf16(files: Sequence[Path], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Join what each rank's optimizer for bf16 under ZeRO 1 has written, which DeepSpeed's own script does not take."""
    pieces: dict[str, list[Tensor]] = {}
    for file in files:
        state = _load(file)["optimizer_state_dict"]
        groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        for flat, places in groups:
            for name, place in places.items():
                pieces.setdefault(name, []).append(flat.detach()[place.start : place.start + place.numel])
    return {name: torch.cat(parts).view(shapes[name]) for name, parts in pieces.items()}


def _consolidated(folder: Path) -> dict[str, Tensor]:
    """Join the ranks' parts of a ZeRO checkpoint into the weights that its optimizer steps."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints its progress, which is over in a moment, on both channels.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))
