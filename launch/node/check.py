"""Check a node before it takes part in a job: `python -m hydrazero.launch.node.check --attempt DIR [COMMAND]`.

The node must have enough GPUs, each of which multiplies matrices correctly; folders on its own disk must be writable,
with enough space where shards are copied to; and a command of the site must end with status 0.
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
"""Number of rows and columns of the matrices that a GPU multiplies."""


def check_devices(expected: int) -> None:
    """Raise ConfigError if there are fewer GPUs than expected, or if one computes wrongly."""
    import torch

    from hydrazero.shards.device import device_kind, gpu_module

    gpu = gpu_module()
    found = 0 if gpu is None else gpu.device_count()
    if found < expected:
        raise ConfigError(f"torch sees {found} of {expected} GPUs.")
    numbers = torch.arange(SIDE * SIDE, dtype=torch.float64).reshape(SIDE, SIDE) % 7
    right = numbers @ numbers  # small whole numbers: the product is exact in any order of summation
    for device in range(expected):
        try:
            on_device = numbers.to(torch.device(device_kind(), device), torch.float32)
            product = (on_device @ on_device).cpu().double()
        except RuntimeError as error:
            raise ConfigError(f"GPU {device} cannot compute ({' '.join(str(error).split())[:200]}).") from error
        if not torch.equal(product, right):
            raise ConfigError(f"GPU {device} multiplies matrices incorrectly.")


def check_disk(folder: Path) -> None:
    """Create a folder on the node's own disk; raise ConfigError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}).") from error


def check_space(folder: Path, needed: int) -> None:
    """Raise ConfigError if a folder has space for fewer than `needed` bytes; files in it may be overwritten."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + held
    if free < needed:
        raise ConfigError(f"{folder} has space for {free / 1e9:.1f} GB, but the shards have {needed / 1e9:.1f} GB.")


def check_health(command: Sequence[str]) -> None:
    """Raise ConfigError if a command of the site does not end with status 0."""
    try:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, preexec_fn=kill_with_parent).returncode
    except OSError as error:
        raise ConfigError(f"'{shlex.join(command)}' cannot be started ({error.strerror}).") from error
    if status:
        raise ConfigError(f"'{shlex.join(command)}' ended with exit status {status}.")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--attempt", required=True, type=click.Path(path_type=Path), help="Folder for records.")
@click.option("--within", required=True, type=float, help="Seconds that all checks together may take.")
@click.option("--devices", default=0, help="Number of GPUs that the node must have.")
@click.option(
    "--folder", "folders", multiple=True, type=click.Path(path_type=Path), help="Folder to create on its own disk."
)
@click.option("--copies", type=click.Path(path_type=Path), help="Folder on its own disk to which shards are copied.")
@click.option("--room", default=0, help="Bytes for which the folder for copies must have space.")
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
    """Check this node; end with status 1 and a sentence if it cannot take part."""
    steps = [Step(what=f"the check of {folder}", do=partial(check_disk, folder)) for folder in folders]
    if copies is not None:
        steps.append(Step(what=f"the check of {copies}", do=partial(check_disk, copies)))
        steps.append(Step(what=f"the check of the space in {copies}", do=partial(check_space, copies, room)))
    if devices:
        steps.append(Step(what="the check of its GPUs", do=partial(check_devices, devices)))
    if health:
        steps.append(Step(what=f"'{shlex.join(health)}'", do=partial(check_health, health)))
    made = [*folders, *([] if copies is None else [copies])]
    end_with_steps(attempt, "check", within, steps, made)


if __name__ == "__main__":
    main()
