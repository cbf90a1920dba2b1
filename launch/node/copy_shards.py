"""Copy tasks' shards to this node's own disk: `python -m hydrazero.launch.node.copy_shards --attempt DIR --to DIR ...`.

All nodes of a job do so at once, each from the file system that they share. A broadcast of file after file through the
scheduler (sbcast) reads every file only once, but takes a round through the job's nodes for each of some ten thousand
shards, from the one node that reads; a shared file system has the bandwidth of all its servers, and what a site
file and a plan say of it holds here too.
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
"""Files that a node copies at a time: a disk of a node takes what several streams of a shared file system bring."""


def copy_tasks(folders: Mapping[str, Path], to: Path, node: str) -> None:
    """Copy the files of each task's folder to `to`/TASK; raises ConfigError if one cannot be read or written."""
    files = [(path, to / task / path.name) for task, folder in folders.items() for path in _files(folder)]
    if not files:
        return
    for task in folders:
        _make(to / task)
    # Each node begins elsewhere, so that they do not all ask the same server for the same file.
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
        raise ConfigError(f"{folder} cannot be made ({error.strerror}).") from error


def _copy(pair: tuple[Path, Path]) -> None:
    source, target = pair
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"{source} cannot be copied to {target} ({error.strerror}).") from error


@click.command()
@click.option("--attempt", required=True, type=click.Path(path_type=Path), help="Folder for notes.")
@click.option("--within", required=True, type=float, help="Seconds that all of it may take.")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder on the node's own disk.")
@click.option(
    "--task", "tasks", nargs=2, multiple=True, type=(str, click.Path(path_type=Path)), help="Name, folder of shards."
)
def main(attempt: Path, within: float, to: Path, tasks: tuple[tuple[str, Path], ...]) -> None:
    """Copy shards here; ends with status 1 and a sentence if that cannot be."""
    copy = Step(what=f"copying shards to {to}", do=partial(copy_tasks, dict(tasks), to, node_name()))
    end_with_steps(attempt, "copy", within, [copy], made=[to])


if __name__ == "__main__":
    main()
