"""Convert the sixteen real tasks of sixteen.toml and check their counts: `python -m results.sixteen DATA OUT`.

A task whose folder exists with the right counts is not converted again.
"""

from __future__ import annotations

import sys
import time
import tomllib
from pathlib import Path

import click
from pydantic import Field
from rich.console import Console
from rich.table import Table

from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.convert.workers import Workers, worker_processes
from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.manifest import Manifest, read_manifest
from hydrazero.shards.settings_parser import ListOf, Section, parse_settings

HERE = Path(__file__).parent


class TaskCounts(Section):
    """The sources of a real task and the counts that its conversion gives; its settings are convert/TASK.toml."""

    sources: ListOf[str]
    """Files or folders below the data folder."""
    structures: int
    """Number of structures in all splits."""
    duplicates: int = 0
    """Number of frames whose geometry occurred before."""
    set_aside: dict[str, int] = Field(default_factory=dict)
    """Number of frames that are left out, by reason."""

    def faults(self, manifest: Manifest) -> list[str]:
        """Return the counts of a manifest that differ, as texts."""
        counts = {
            "structures": (self.structures, manifest.structures()),
            "duplicates": (self.duplicates, manifest.duplicate_count),
            "frames set aside": (self.set_aside, manifest.set_aside),
        }
        return [f"{found} {name} instead of {wanted}" for name, (wanted, found) in counts.items() if found != wanted]


def expected_tasks() -> dict[str, TaskCounts]:
    """Return the sixteen tasks by name."""
    path = HERE / "sixteen.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: parse_settings(TaskCounts, entry, f"{path}: {name}") for name, entry in table.items()}


def convert_task(
    name: str, expected: TaskCounts, data: Path, out: Path, *, workers: Workers, trust_pickle: bool
) -> Manifest:
    """Return the manifest of a task in `out`/NAME, which is converted unless it exists with the right counts.

    Raise ConfigError if a folder with other counts exists, and the errors of `convert`.
    """
    folder = out / name
    if folder.exists():
        kept = read_manifest(folder)
        if expected.faults(kept):
            raise ConfigError(f"{folder} has {', '.join(expected.faults(kept))}; remove it to convert it again.")
        return kept
    settings = load_convert_settings(HERE.parents[1] / "launch" / "convert" / f"{name}.toml")
    sources = [data / source for source in expected.sources]
    return convert(sources, name, folder, settings, workers=workers, trust_pickle=trust_pickle)


def convert_all(data: Path, out: Path, *, workers: Workers, trust_pickle: bool, console: Console) -> list[str]:
    """Convert every task, print a table of counts, and return a sentence for each wrong one."""
    if not data.is_dir():
        raise ConfigError(f"data folder {data} does not exist; give the folder that holds wbe_fitsnap and the others.")
    table = Table("task")
    for heading in ("structures", "duplicates", "set aside", "seconds"):
        table.add_column(heading, justify="right")
    wrong = []
    for name, expected in expected_tasks().items():
        there = (out / name).exists()
        begin = time.perf_counter()
        manifest = convert_task(name, expected, data, out, workers=workers, trust_pickle=trust_pickle)
        seconds = "kept" if there else f"{time.perf_counter() - begin:.1f}"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.set_aside.items()) or "-"
        table.add_row(name, f"{manifest.structures():,}", f"{manifest.duplicate_count:,}", reasons, seconds)
        faults = expected.faults(manifest)
        wrong += [f"task '{name}' has {', '.join(faults)}."] if faults else []
    console.print(table)
    return wrong


@click.command(help="Convert the sixteen real tasks from DATA into OUT and check their counts.")
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--workers", default=1, show_default=True, help="Processes that share the work.")
@click.option("--trust-pickle", is_flag=True, help="Load the pickles of the lips task, which could run any code.")
def main(data: Path, out: Path, workers: int, trust_pickle: bool) -> None:
    """Run from the command line; end with exit status 1 and a sentence if a count is wrong."""
    try:
        with worker_processes(workers) as pool:
            if pool is None:  # a rank of mpirun that worked for the first rank
                return
            wrong = convert_all(data, out, workers=pool, trust_pickle=trust_pickle, console=Console())
    except HydrazeroError as error:
        wrong = [str(error)]
    for sentence in wrong:
        click.echo(f"Error: {sentence}", err=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
