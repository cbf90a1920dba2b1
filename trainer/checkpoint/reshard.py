"""Loading a checkpoint into an engine whose weights and moments are partitioned in another way.

Parts are copied by parameter without any rounding, so that other ranks, another ZeRO stage or another precision of the
model's weights lose nothing of the optimizer's weights and moments. DeepSpeed's universal checkpoints go through
further files for this, and support neither from nor to stage 0.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.zero_files import ZeroFiles
from hydrazero.trainer.engine.partition import Partition
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.zero_layout import layout_of
from hydrazero.trainer.ranks.distributed import rank


@torch.no_grad()
def load_from_partition(engine: TrainingEngine, folder: Path, saved: Partition) -> None:
    """Load a checkpoint of another partition into an engine; called on every rank.

    Raises ConfigError if other parameters are trained than in the checkpoint, or if the optimizer keeps a state that
    cannot be divided by parameter.
    """
    layout, files = layout_of(engine), ZeroFiles(folder, saved)
    now = layout.partition()
    if set(now.places) != set(saved.places):
        raise ConfigError(
            f"checkpoint {folder} was trained with other parameters than the run file trains now; resume with the "
            "same train.freeze and model."
        )
    layout.release_gathered()
    named = dict(engine.module.named_parameters()) | dict(engine.module.named_buffers())
    for name, value in files.untrained():
        layout.set_untrained(named[name], value)
    state = {}
    for number, flat in enumerate(layout.master_weights()):
        names = [name for name, place in now.places.items() if place.flat == number]
        state[number] = _fill(flat, names, now, files)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in files.groups()]
    layout.load_state(state, groups)
    if engine.lr_scheduler is not None and files.facts["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(files.facts["lr_scheduler"])
    for count in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, count, files.facts[count])


def _fill(flat: Tensor, names: list[str], now: Partition, files: ZeroFiles) -> dict[str, Any]:
    """Set this rank's part of a flat tensor, and return the state that belongs to it."""
    like = files.state_like(names[0])
    divided = [key for key, value in like.items() if torch.is_tensor(value) and value.dim() > 0]
    # Counts of steps are copied: one flat tensor may become many, each of which continues its own count.
    state: dict[str, Any] = {
        key: torch.zeros_like(flat) if key in divided else copy.deepcopy(value) for key, value in like.items()
    }
    for name in names:
        part = now.part(name, rank())
        if part is None:
            continue
        for key in (None, *divided):
            values = files.read(name, part.begin, part.begin + part.size, key)
            if len(values) != part.size:
                raise ConfigError(
                    f"the optimizer's state '{key}' does not have one number for each weight, so it cannot be moved to "
                    "other ranks or another ZeRO stage; resume with the ranks and the stage of the checkpoint."
                )
            target = flat if key is None else state[key]
            target.detach().view(-1)[part.start : part.start + part.size].copy_(values)
    return state
