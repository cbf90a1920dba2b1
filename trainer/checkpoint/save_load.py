"""Checkpoints: DeepSpeed's files of a step, with everything else that a run needs to continue."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, NonNegativeInt
from safetensors import SafetensorError

from hydrazero.shards.device import device_kind, gpu_module
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import check_shape
from hydrazero.trainer.checkpoint.folders import (
    CHECKSUMS_NAME,
    PART,
    BestCheckpoint,
    Retention,
    file_sum,
    finish_checkpoint,
    folder_of,
    remove_leftovers,
    restoring,
    step_of,
)
from hydrazero.trainer.checkpoint.reshard import load_from_partition
from hydrazero.trainer.checkpoint.safe_load import safe_load
from hydrazero.trainer.engine.partition import partition_in
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.engine.zero_layout import layout_of
from hydrazero.trainer.ranks.distributed import from_first, gather_objects, gather_to_first, rank, ranks, wait_for_all
from hydrazero.trainer.records.identity import check_identity

STATE_NAME = "run_state.pt"
"""File in a checkpoint: position in the data, balancing, and everything else that all ranks share."""


class RunState(BaseModel):
    """What the state of a run must hold; its parts are checked by those that restore them."""

    step: NonNegativeInt
    best: BestCheckpoint | None
    stale: NonNegativeInt
    skipped_structures: NonNegativeInt
    trained_seconds: float = 0.0
    interval: dict[str, Any]
    stream: dict[str, Any]
    balance: dict[str, Any]
    guard: dict[str, float]
    random: dict[str, Any]
    layout: dict[str, Any]
    settings: dict[str, Any] = {}
    average_steps: NonNegativeInt = 0


WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""Errors that a full disk raises, depending on the library that writes."""


def save_checkpoint(
    engine: TrainingEngine, run_dir: Path, state: dict[str, Any], average: WeightAverage | None, retention: Retention
) -> str | None:
    """Write the checkpoint of state['step'], check it, then give it its name; called on every rank.

    Older checkpoints are removed unless `retention` keeps them. Return None, or the reason why the checkpoint could not
    be written, in which case all older ones stay.
    """
    part = folder_of(run_dir, state["step"])
    part = part.with_name(part.name + PART)
    failures: list[str] = []
    if rank() == 0:
        remove_leftovers(run_dir)
        _attempt(lambda: part.mkdir(parents=True), failures)
    if (reason := _first_failure(failures)) is not None:
        return reason
    layout = layout_of(engine)
    state = {**state, "random": random_states(), "layout": layout.partition().document()}
    with layout.writing_with(lambda write: _attempt(write, failures)):
        engine.save_checkpoint(str(part.parent), tag=part.name, save_latest=False)
    layout.release_gathered()
    if average is not None:
        _attempt(lambda: average.save(part), failures)
        state = {**state, "average_steps": average.steps}
    if rank() == 0:
        _attempt(lambda: torch.save(state, part / STATE_NAME), failures)
    wait_for_all()
    # Rank 0 alone lists the folder: under ZeRO it holds files of every rank, and each rank would look up all of them.
    names: list[str] = []
    _attempt(lambda: names.extend(from_first(lambda: _files(part))), failures)
    sums: dict[str, str] = {}
    _attempt(lambda: sums.update(_sums_of(part, names[rank() :: ranks()])), failures)
    reason = _first_failure(failures)
    all_sums = {name: value for each in gather_objects(sums) for name, value in each.items()}
    last_failures: list[str] = []
    if rank() == 0:
        if reason is None:
            _attempt(lambda: finish_checkpoint(part, dict(sorted(all_sums.items())), retention), last_failures)
        if reason is not None or last_failures:
            shutil.rmtree(part, ignore_errors=True)
    last_reason = _first_failure(last_failures)  # every rank waits here until rank 0 has finished
    return last_reason if reason is None else reason


def _first_failure(failures: list[str]) -> str | None:
    """Return the first failure of any rank, None if there is none; called on every rank."""
    return next((failure for of_rank in gather_objects(failures) for failure in of_rank), None)


def _attempt(write: Callable[[], object], failures: list[str]) -> None:
    try:
        write()
    except WRITE_ERRORS as error:
        failures.append(" ".join(str(error).split()))


def _files(part: Path) -> list[str]:
    """Return the names of a checkpoint's files, relative to its folder."""
    found = (path for path in part.rglob("*") if path.is_file() and path.name != CHECKSUMS_NAME)
    return sorted(str(path.relative_to(part)) for path in found)


def _sums_of(part: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the checksums of files of a checkpoint, read back from the disk; raises OSError if one is damaged."""
    sums = {}
    for path in (part / name for name in names):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        # torch writes archives that hold checksums of the data in memory.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise OSError(f"{path}: {damaged} does not read back as it was written")
        sums[str(path.relative_to(part))] = file_sum(path)
    return sums


def random_states() -> dict[str, torch.Tensor]:
    """Return, on rank 0 alone, the states of all ranks' random number generators: [ranks, bytes] by kind of device."""
    states = {"cpu": gather_to_first(torch.get_rng_state())}
    if (gpu := gpu_module()) is not None:
        states[device_kind()] = gather_to_first(gpu.get_rng_state())
    return {kind: torch.stack(of_ranks) for kind, of_ranks in states.items() if of_ranks}


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Set this rank's random number generators; a rank that was not there before takes the state of the last rank."""
    for kind, of_ranks in states.items():
        # A copy, since torch reads a state from the beginning of its memory even if it is a view of a later row.
        own = of_ranks[min(rank(), len(of_ranks) - 1)].clone()
        if kind == "cpu":
            torch.set_rng_state(own)
        elif kind == device_kind():
            gpu_module().set_rng_state(own)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that all ranks share.

    Raises ConfigError if it is damaged, or if the checkpoint belongs to another run than its folder.
    """
    state = safe_load(folder / STATE_NAME)
    if not isinstance(state, dict):
        raise ConfigError(f"{folder / STATE_NAME} does not hold the state of a run; use a checkpoint that is intact.")
    check_identity(folder.parent.parent, folder, state)
    check_shape(state, str(folder / STATE_NAME), RunState, hint="use a checkpoint that is intact")
    if state["step"] != step_of(folder):
        raise ConfigError(f"{folder / STATE_NAME} is of step {state['step']}; use a checkpoint that is intact.")
    return state


def resumed_from(state: dict[str, Any], engine: TrainingEngine) -> str:
    """Return a sentence on the step from which a run continues, and on a change of ranks, ZeRO stage or precision."""
    saved, here = partition_in(state["layout"]), layout_of(engine).partition()
    before, now = (f"{each.ranks} ranks, ZeRO {each.stage}, {each.precision}" for each in (saved, here))
    changed = "" if before == now else f" with {now}; before, the run had {before}"
    return f"resumed from step {state['step']}{changed}."


def load_checkpoint(engine: TrainingEngine, folder: Path, average: WeightAverage | None) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and random state, and return the run's state; called on every rank.

    With the number of ranks, ZeRO stage and precision of the checkpoint, the result is the same bit for bit. Otherwise
    weights and moments are partitioned anew; raises ConfigError if that is not possible.
    """
    state = from_first(lambda: read_state(folder))
    with restoring(folder):
        _restore(engine, folder, state, average)
    return state


def _restore(engine: TrainingEngine, folder: Path, state: dict[str, Any], average: WeightAverage | None) -> None:
    saved = partition_in(state["layout"])
    layout = layout_of(engine)
    if saved != layout.partition():
        load_from_partition(engine, folder, saved)
    else:
        with layout.reading_with(safe_load):
            found = engine.load_checkpoint(str(folder.parent), tag=folder.name)[0]
        if found is None:
            raise ConfigError(f"checkpoint {folder} cannot be loaded with this run's configuration.")
    layout.release_gathered()
    set_random_states(state["random"])
    if average is not None and "average_steps" in state:
        average.load(folder, state["average_steps"])
    elif average is not None:  # the run keeps an average only from here on
        average.start_here()
