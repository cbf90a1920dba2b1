"""Checkpoints: DeepSpeed's files of a step with everything else that a run needs to go on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint_files import CHECKSUMS_NAME, PART, file_sum, finish_checkpoint, folder_of
from hydrazero.trainer.distributed import gather_objects, rank, ranks, wait_for_all
from hydrazero.trainer.weight_average import WeightAverage

STATE_NAME = "run_state.pt"
"""Place in the data, balancing, and whatever else is the same for all ranks."""

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk makes of writing, by whoever writes."""


def save_checkpoint(
    engine: Any, run_dir: Path, state: dict[str, Any], average: WeightAverage | None, keep: int
) -> str | None:
    """Write a checkpoint of state['step'], check it, then name it; called on every rank.

    It is kept with the `keep` last ones and the best, which state['best'] names. Returns why it could not be written,
    in which case the ones before stay.
    """
    part = folder_of(run_dir, state["step"])
    part = part.with_name(part.name + PART)
    if rank() == 0:
        for left in part.parent.glob(f"step-*{PART}"):  # by a run that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
    wait_for_all()
    failures: list[str] = []
    random = torch.stack(gather_objects(torch.get_rng_state()))
    layout = {"ranks": ranks(), "stage": int(engine.zero_optimization_stage()), "precision": precision_of(engine)}
    with _writing_errors_kept(engine, failures):
        engine.save_checkpoint(str(part.parent), tag=part.name, save_latest=False)
    if average is not None:
        _try(lambda: average.save(part), failures)
        state = {**state, "average_steps": average.steps}
    if rank() == 0:
        _try(lambda: torch.save({**state, "random": random, "layout": layout}, part / STATE_NAME), failures)
    wait_for_all()
    sums: dict[str, str] = {}
    _try(lambda: sums.update(_sums_of_share(part)), failures)
    met = [reason for reasons in gather_objects(failures) for reason in reasons]
    every: dict[str, str] = {}
    for share in gather_objects(sums):
        every.update(share)
    late: list[str] = []
    if rank() == 0:
        if not met:
            _try(lambda: finish_checkpoint(part, dict(sorted(every.items())), state.get("best"), keep), late)
        if met or late:
            shutil.rmtree(part, ignore_errors=True)
    met += [reason for reasons in gather_objects(late) for reason in reasons]
    return met[0] if met else None


def _try(write: Callable[[], object], failures: list[str]) -> None:
    try:
        write()
    except WRITE_ERRORS as error:
        failures.append(" ".join(str(error).split()))


def _sums_of_share(part: Path) -> dict[str, str]:
    """Read back this rank's share of a checkpoint's files."""
    files = sorted(path for path in part.rglob("*") if path.is_file() and path.name != CHECKSUMS_NAME)
    return {str(path.relative_to(part)): file_sum(path) for path in files[rank() :: ranks()]}


@contextlib.contextmanager
def _writing_errors_kept(engine: Any, failures: list[str]) -> Iterator[None]:
    """Let DeepSpeed go through with a checkpoint whose files cannot be written: the other ranks would wait for ever."""
    writer = engine.checkpoint_engine
    save = writer.save

    def careful(state_dict: Any, path: str) -> None:
        _try(lambda: save(state_dict, path), failures)

    writer.save = careful
    try:
        yield
    finally:
        writer.save = save


def precision_of(engine: Any) -> str:
    """Return the precision of an engine's weights, as a checkpoint depends on it."""
    return str(next(engine.module.parameters()).dtype).removeprefix("torch.")


def read_state(folder: Path) -> dict[str, Any]:
    """Return what all ranks share of a checkpoint."""
    state: dict[str, Any] = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=False)
    return state


def load_checkpoint(engine: Any, folder: Path, average: WeightAverage | None) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and random state; returns the run's state. Called on every rank."""
    state = read_state(folder)
    written, now = state["layout"]["precision"], precision_of(engine)
    if written != now:
        raise ConfigError(
            f"checkpoint {folder} holds {written} weights and cannot go on with {now}; resume with the precision that "
            "the run was started in."
        )
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise ConfigError(f"checkpoint {folder} cannot be loaded with this run's configuration.")
    random = state["random"]
    # A copy: torch reads the state from where the tensor's memory begins, whatever row of it a view is, and crashes.
    torch.set_rng_state(random[min(rank(), len(random) - 1)].clone())
    if average is not None and "average_steps" in state:
        average.load(folder, state["average_steps"])
    return state
