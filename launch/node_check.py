"""What a node must be able to do before it takes part: `python -m hydrazero.launch.node_check --attempt DIR`.

As many GPUs as it should have, each of which multiplies matrices rightly; room on its own disk for the shards.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import click

from hydrazero.launch.rank_records import add_event
from hydrazero.shards.errors import ConfigError, HydrazeroError

SIDE = 256
"""Of the matrices that a GPU multiplies."""


def check_devices(wanted: int) -> None:
    """Raise ConfigError if there are fewer GPUs than there should be, or one computes wrongly."""
    import torch

    from hydrazero.trainer.gpu import device_kind, gpu_module

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


def check_disk(folder: Path, room: int) -> None:
    """Make a folder on the node's own disk; raises ConfigError if it cannot be written or has too little room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}).") from error
    free = shutil.disk_usage(folder).free
    if free < room:
        raise ConfigError(f"{folder} has room for {free / 1e9:.1f} GB, and the shards are {room / 1e9:.1f} GB.")


@click.command()
@click.option("--attempt", required=True, type=click.Path(path_type=Path), help="Folder for notes.")
@click.option("--devices", default=0, help="GPUs that the node must have.")
@click.option("--folder", "folders", multiple=True, type=click.Path(path_type=Path), help="To make on its own disk.")
@click.option("--room", default=0, help="Bytes that the folders must have room for.")
def main(attempt: Path, devices: int, folders: tuple[Path, ...], room: int) -> None:
    """Check this node; ends with status 1 and a sentence if it is not fit."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
    try:
        for folder in folders:
            check_disk(folder, room)
        if devices:
            check_devices(devices)
    except HydrazeroError as error:
        click.echo(f"Error: node {node} is not fit: {error}", err=True)
        add_event(attempt, node, "unfit", reason=str(error).rstrip("."))
        sys.exit(1)


if __name__ == "__main__":
    main()
