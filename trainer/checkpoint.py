"""Checkpoints: DeepSpeed's folder of a step with everything that a run needs to go on."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from hydrazero.models.atomistic import AtomisticModel, model_from_facts
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.distributed import gather_objects, quiet_deepspeed, rank, wait_for_all
from hydrazero.trainer.run_files import MODEL_FACTS_NAME, read_json
from hydrazero.trainer.trained_model import PREFIX

CHECKPOINTS = "checkpoints"
LATEST = "latest"


def save_checkpoint(engine: Any, run_dir: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint with the run's `state`, of which 'step' names it; called on every rank.

    Older ones than the last `keep` are removed after it.
    """
    folder = run_dir / CHECKPOINTS
    tag = f"step-{state['step']:08d}"
    client_state = {**state, "random": torch.stack(gather_objects(torch.get_rng_state()))}
    engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    wait_for_all()
    if rank() == 0:
        # The name is written last and in one piece: a run killed while saving goes on from the checkpoint before.
        part = folder / (LATEST + ".part")
        part.write_text(tag)
        os.replace(part, folder / LATEST)
        # Folders of later steps were left by a run that was killed while it saved.
        names = sorted(path.name for path in folder.glob("step-*"))
        earlier = [name for name in names if name <= tag]
        for old in [*earlier[:-keep], *(name for name in names if name > tag)]:
            shutil.rmtree(folder / old)
    wait_for_all()


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the run has written a complete checkpoint."""
    return (run_dir / CHECKPOINTS / LATEST).is_file()


def latest_checkpoint(run_dir: Path) -> Path:
    """Return the folder of the last complete checkpoint; raises ConfigError if the run has none."""
    pointer = run_dir / CHECKPOINTS / LATEST
    if not has_checkpoint(run_dir):
        raise ConfigError(f"{run_dir} holds no checkpoint; train it first.")
    folder = pointer.parent / pointer.read_text().strip()
    if not re.fullmatch(r"step-\d{8}", folder.name) or not folder.is_dir():
        raise ConfigError(f"{pointer} names '{folder.name}', which is no checkpoint of {run_dir}.")
    return folder


def load_checkpoint(engine: Any, run_dir: Path) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and random state; returns the run's state."""
    folder = latest_checkpoint(run_dir)
    path, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise ConfigError(f"checkpoint {folder} cannot be loaded with this run's configuration.")
    random = client_state["random"]
    # A copy: torch reads the state from where the tensor's memory begins, whatever row of it a view is, and crashes.
    torch.set_rng_state(random[min(rank(), len(random) - 1)].clone())
    state: dict[str, Any] = client_state
    return state


def _consolidated(folder: Path) -> dict[str, torch.Tensor]:
    """Join the ranks' parts of a ZeRO checkpoint into float32 weights."""
    quiet_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints its progress, which is over in a moment, on both channels.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


def model_of_run(run_dir: Path) -> AtomisticModel:
    """Build the model of a run with the weights of its last checkpoint, in float32 on the CPU, without an engine."""
    facts = read_json(run_dir / MODEL_FACTS_NAME)
    folder = latest_checkpoint(run_dir)
    if any(folder.glob("*zero_pp_rank_*_optim_states.pt")):
        weights = _consolidated(folder)
    else:
        weights = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    model = model_from_facts(facts)
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in weights.items()}, strict=True)
    return model.eval()
