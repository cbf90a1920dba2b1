"""Commands on data: convert and inspect."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.shards.errors import ConfigError

FOLDER = click.Path(path_type=Path)


@click.command("convert")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=FOLDER)
@click.option("--task", "tasks", multiple=True, required=True, metavar="NAME", help="Name of the task.")
@click.option("--out", required=True, metavar="DIR", type=FOLDER, help="New folder for the shards.")
@click.option("--format", "format_name", metavar="NAME", help="ase, extxyz, db or npz; guessed from the suffix.")
@click.option("--config", metavar="FILE", type=FOLDER, help="TOML: field names, units, splits, selection, method.")
@click.option("--skip-bad", is_flag=True, help="Set bad frames aside, counted and listed, instead of stopping.")
@click.option("--trust-pickle", is_flag=True, help="Load sources of pickles, which can run any code that is in them.")
@click.option("--workers", default=1, metavar="N", help="Processes that share the work; under mpirun, its ranks do.")
def convert_command(
    sources: tuple[Path, ...],
    tasks: tuple[str, ...],
    out: Path,
    format_name: str | None,
    config: Path | None,
    skip_bad: bool,
    trust_pickle: bool,
    workers: int,
) -> None:
    """Convert labelled structures into WebDataset shards of one task."""
    from hydrazero.shards.convert_settings import load_convert_settings
    from hydrazero.trainer.convert_console import convert_with_progress

    if len(tasks) > 1:
        raise ConfigError(f"--task is given {len(tasks)} times ({', '.join(tasks)}); a conversion makes one task.")
    settings = load_convert_settings(config, format_name)
    convert_with_progress(
        sources, tasks[0], out, settings, workers=workers, skip_bad=skip_bad, trust_pickle=trust_pickle
    )
