"""Checkpoints: DeepSpeed's files of a step with everything else that a run needs to go on."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.folders import (
    CHECKSUMS_NAME,
    PART,
    Kept,
    file_sum,
    finish_checkpoint,
    folder_of,
    remove_leftovers,
)
from hydrazero.trainer.checkpoint.layout import layout_in, layout_of
from hydrazero.trainer.checkpoint.reshard import load_from_layout
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.ranks.device import device_kind, gpu_module
from hydrazero.trainer.ranks.distributed import from_first, gather_objects, gather_to_first, rank, ranks, wait_for_all

STATE_NAME = "run_state.pt"
"""Place in the data, balancing, and whatever else is the same for all ranks."""

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk makes of writing, by whoever writes."""


def save_checkpoint(
    engine: Any, run_dir: Path, state: dict[str, Any], average: WeightAverage | None, kept: Kept
) -> str | None:
    """Write a checkpoint of state['step'], check it, then name it; called on every rank.

    Others that are not `kept` are removed. Returns why it could not be written, in which case the ones before stay.
    """
    part = folder_of(run_dir, state["step"])
    part = part.with_name(part.name + PART)
    failures: list[str] = []
    if rank() == 0:
        remove_leftovers(run_dir)
        _try(lambda: part.mkdir(parents=True), failures)
    met = [reason for reasons in gather_objects(failures) for reason in reasons]
    if met:
        return met[0]
    state = {**state, "random": random_states(), "layout": layout_of(engine).document()}
    with _writing_errors_kept(engine, failures):
        engine.save_checkpoint(str(part.parent), tag=part.name, save_latest=False)
    let_go_of_whole_parameters(engine)
    if average is not None:
        _try(lambda: average.save(part), failures)
        state = {**state, "average_steps": average.steps}
    if rank() == 0:
        _try(lambda: torch.save(state, part / STATE_NAME), failures)
    wait_for_all()
    # One lists the folder, which under ZeRO has a file of every rank: all of them would ask for each of its files.
    names: list[str] = []
    _try(lambda: names.extend(from_first(lambda: _files(part))), failures)
    sums: dict[str, str] = {}
    _try(lambda: sums.update(_sums_of(part, names[rank() :: ranks()])), failures)
    met = [reason for reasons in gather_objects(failures) for reason in reasons]
    every: dict[str, str] = {}
    for share in gather_objects(sums):
        every.update(share)
    late: list[str] = []
    if rank() == 0:
        if not met:
            _try(lambda: finish_checkpoint(part, dict(sorted(every.items())), kept), late)
        if met or late:
            shutil.rmtree(part, ignore_errors=True)
    met += [reason for reasons in gather_objects(late) for reason in reasons]
    return met[0] if met else None


def _try(write: Callable[[], object], failures: list[str]) -> None:
    try:
        write()
    except WRITE_ERRORS as error:
        failures.append(" ".join(str(error).split()))


def _files(part: Path) -> list[str]:
    """Names of a checkpoint's files, in its folder."""
    found = (path for path in part.rglob("*") if path.is_file() and path.name != CHECKSUMS_NAME)
    return sorted(str(path.relative_to(part)) for path in found)


def _sums_of(part: Path, names: Sequence[str]) -> dict[str, str]:
    """Read back files of a checkpoint, once they are on the disk; OSError if one is not whole."""
    sums = {}
    for path in (part / name for name in names):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        # torch writes archives with checksums of what it had in memory.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise OSError(f"{path}: {damaged} does not read back as it was written")
        sums[str(path.relative_to(part))] = file_sum(path)
    return sums


@contextlib.contextmanager
def _writing_errors_kept(engine: Any, failures: list[str]) -> Iterator[None]:
    """Let DeepSpeed go through with a checkpoint whose files cannot be written: the other ranks would wait for ever."""
    writer = engine.checkpoint_engine
    save, copy_script = writer.save, engine._copy_recovery_script

    def careful(state_dict: Any, path: str) -> None:
        _try(lambda: save(state_dict, path), failures)

    writer.save = careful
    # A script that makes one file of weights out of DeepSpeed's: `hydrazero export` does.
    engine._copy_recovery_script = lambda path: None
    try:
        yield
    finally:
        writer.save, engine._copy_recovery_script = save, copy_script


def let_go_of_whole_parameters(engine: Any) -> None:
    """Drop the small parameters that DeepSpeed has gathered after saving or loading under ZeRO 3.

    As at the start of a run: in its first steps it notes which parameters are fetched when, misses those that are
    whole, and fails where it needs them later.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of all ranks' generators of random numbers, [ranks, bytes] by kind of device, on rank 0."""
    states = {"cpu": gather_to_first(torch.get_rng_state())}
    if (gpu := gpu_module()) is not None:
        states[device_kind()] = gather_to_first(gpu.get_rng_state())
    return {kind: torch.stack(of_ranks) for kind, of_ranks in states.items() if of_ranks}


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Set this rank's generators; a rank that is new takes the state of the last one."""
    for kind, of_ranks in states.items():
        # A copy: torch reads the state from where the memory begins, whatever row of it a view is, and crashes.
        own = of_ranks[min(rank(), len(of_ranks) - 1)].clone()
        if kind == "cpu":
            torch.set_rng_state(own)
        elif kind == device_kind():
            gpu_module().set_rng_state(own)


def read_state(folder: Path) -> dict[str, Any]:
    """Return what all ranks share of a checkpoint."""
    state: dict[str, Any] = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=False)
    return state


def resumed_from(state: dict[str, Any], engine: Any) -> str:
    """Say where a run goes on, and what is another way of cutting than the checkpoint's."""
    saved, here = layout_in(state["layout"]), layout_of(engine)
    ways = [f"{way.ranks} ranks, ZeRO {way.stage}, {way.precision}" for way in (saved, here)]
    changed = "" if ways[0] == ways[1] else f": {ways[1]}; before it was {ways[0]}"
    return f"goes on from step {state['step']}{changed}."


def load_checkpoint(engine: Any, folder: Path, average: WeightAverage | None) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and random state; returns the run's state. Called on every rank.

    Written by the same number of ranks under the same ZeRO stage in the same precision, all is as it was, to the bit;
    otherwise weights and moments are cut anew. Raises ConfigError if that is not possible.
    """
    state = from_first(lambda: read_state(folder))
    saved = layout_in(state["layout"])
    if saved != layout_of(engine):
        load_from_layout(engine, folder, saved)
    elif engine.load_checkpoint(str(folder.parent), tag=folder.name)[0] is None:
        raise ConfigError(f"checkpoint {folder} cannot be loaded with this run's configuration.")
    let_go_of_whole_parameters(engine)
    set_random_states(state["random"])
    if average is not None and "average_steps" in state:
        average.load(folder, state["average_steps"])
    elif average is not None:  # it is kept only from here on
        average.start_here()
    return state
