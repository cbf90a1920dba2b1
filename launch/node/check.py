"""What a node must be able to do before it takes part: `python -m hydrazero.launch.node.check --attempt DIR [COMMAND]`.

As many GPUs as it should have, each of which multiplies matrices rightly; folders on its own disk, with room for the
shards where they are copied to; a command of the site, which must end with status 0.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from hydrazero.launch.node.steps import Step, end_with_steps
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.processes import kill_with_parent

SIDE = 256
"""Of the matrices that a GPU multiplies."""


def check_devices(wanted: int) -> None:
    """Raise ConfigError if there are fewer GPUs than there should be, or one computes wrongly."""
    import torch

    from hydrazero.shards.device import device_kind, gpu_module

    gpu = gpu_module()
    found = 0 if gpu is None else gpu.device_count()
    if found < wanted:
        raise ConfigError(f"torch sees {found} of {wanted} GPUs.")
    numbers = torch.arange(SIDE * SIDE, dtype=torch.float64).reshape(SIDE, SIDE) % 7
    expected = numbers @ numbers  # of small whole numbers: exact in any order of summation
    for device in range(wanted):
        try:
            there = numbers.to(torch.device(device_kind(), device), torch.float32)
            product = (there @ there).cpu().double()
        except RuntimeError as error:
            raise ConfigError(f"GPU {device} does not compute ({' '.join(str(error).split())[:200]}).") from error
        if not torch.equal(product, expected):
            raise ConfigError(f"GPU {device} multiplies matrices wrongly.")


def check_disk(folder: Path) -> None:
    """Make a folder on the node's own disk; raises ConfigError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}).") from error


def check_room(folder: Path, room: int) -> None:
    """Raise ConfigError if a folder has room for fewer than `room` bytes, what lies in it being written over."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + held
    if free < room:
        raise ConfigError(f"{folder} has room for {free / 1e9:.1f} GB, and the shards are {room / 1e9:.1f} GB.")


def check_health(command: Sequence[str]) -> None:
    """Raise ConfigError unless a command of the site ends with status 0."""
    try:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, preexec_fn=kill_with_parent).returncode
    except OSError as error:
        raise ConfigError(f"'{shlex.join(command)}' cannot be started ({error.strerror}).") from error
    if status:
        raise ConfigError(f"'{shlex.join(command)}' ends with status {status}.")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--attempt", required=True, type=click.Path(path_type=Path), help="Folder for notes.")
@click.option("--within", required=True, type=float, help="Seconds that all of it may take.")
@click.option("--devices", default=0, help="GPUs that the node must have.")
@click.option("--folder", "folders", multiple=True, type=click.Path(path_type=Path), help="To make on its own disk.")
@click.option("--copies", type=click.Path(path_type=Path), help="Folder on its own disk that shards are copied to.")
@click.option("--room", default=0, help="Bytes that the folder for copies must have room for.")
@click.argument("health", nargs=-1, type=click.UNPROCESSED)
def main(
    attempt: Path,
    within: float,
    devices: int,
    folders: tuple[Path, ...],
    copies: Path | None,
    room: int,
    health: tuple[str, ...],
) -> None:
    """Check this node; ends with status 1 and a sentence if it is not fit."""
    steps = [Step(what=f"the check of {folder}", do=partial(check_disk, folder)) for folder in folders]
    if copies is not None:
        steps.append(Step(what=f"the check of {copies}", do=partial(check_disk, copies)))
        steps.append(Step(what=f"the check of the room in {copies}", do=partial(check_room, copies, room)))
    if devices:
        steps.append(Step(what="the check of its GPUs", do=partial(check_devices, devices)))
    if health:
        steps.append(Step(what=f"'{shlex.join(health)}'", do=partial(check_health, health)))
    made = [*folders, *([] if copies is None else [copies])]
    end_with_steps(attempt, "check", within, steps, made)


if __name__ == "__main__":
    main()
