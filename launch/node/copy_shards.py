"""Copy shards to this node's own disk: `python -m hydrazero.launch.node.copy_shards --attempt DIR --to DIR ...`.

All nodes of a job copy at the same time, each from the shared file system. A broadcast through the scheduler (sbcast)
would read every file only once, but from a single node, and it takes a round through all nodes for each of some ten
thousand shards. The shared file system has the bandwidth of all its servers; the numbers in a site file and in a plan
apply here too.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click

from hydrazero.launch.node.steps import Step, end_with_steps
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.launcher_variables import node_name

AT_ONCE = 8
"""Number of files that a node copies at the same time: one stream of a shared file system does not saturate a disk."""


def copy_tasks(folders: Mapping[str, Path], to: Path, node: str) -> None:
    """Copy the files of each task's folder to `to`/TASK; raise ConfigError if one cannot be read or written."""
    files = [(path, to / task / path.name) for task, folder in folders.items() for path in _files(folder)]
    if not files:
        return
    for task in folders:
        _make(to / task)
    # Each node begins with another file, so that they do not all read the same file from the same server.
    first = zlib.crc32(node.encode()) % len(files)
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for _ in pool.map(_copy, files[first:] + files[:first]):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror}).") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created ({error.strerror}).") from error


def _copy(pair: tuple[Path, Path]) -> None:
    source, target = pair
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"{source} cannot be copied to {target} ({error.strerror}).") from error


@click.command()
@click.option("--attempt", required=True, type=click.Path(path_type=Path), help="Folder for records.")
@click.option("--within", required=True, type=float, help="Seconds that copying may take.")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder on the node's own disk.")
@click.option(
    "--task",
    "tasks",
    nargs=2,
    multiple=True,
    type=(str, click.Path(path_type=Path)),
    help="Name of a task and its folder of shards.",
)
def main(attempt: Path, within: float, to: Path, tasks: tuple[tuple[str, Path], ...]) -> None:
    """Copy shards to this node; end with status 1 and a sentence if that fails."""
    copy = Step(what=f"copying shards to {to}", do=partial(copy_tasks, dict(tasks), to, node_name()))
    end_with_steps(attempt, "copy", within, [copy], made=[to])


if __name__ == "__main__":
    main()
