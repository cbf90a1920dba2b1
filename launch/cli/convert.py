"""The command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hydrazero.shards.errors import ConfigError

FOLDER = click.Path(path_type=Path)


def _list_presets(context: click.Context, _: Any, wanted: bool) -> None:
    """Print the presets and end."""
    if not wanted:
        return
    from hydrazero.shards.convert.presets import load_preset, preset_names

    for name in preset_names():
        about = load_preset(name).about
        click.secho(name, bold=True)
        for fact in (about.title, f"{about.theory}; {about.elements}", about.layout, about.download):
            click.echo(f"    {fact}")
    context.exit()


@click.command("convert")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=FOLDER)
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Name of the task; the preset's if not given.")
@click.option("--out", required=True, metavar="DIR", type=FOLDER, help="New folder for the shards.")
@click.option("--preset", metavar="NAME", help="Settings of a known dataset.")
@click.option(
    "--list-presets", is_flag=True, is_eager=True, expose_value=False, callback=_list_presets, help="Show the presets."
)
@click.option("--format", "format_name", metavar="NAME", help="Of the sources; guessed from their suffixes.")
@click.option("--config", metavar="FILE", type=FOLDER, help="TOML: field names, units, splits, selection, method.")
@click.option("--skip-bad", is_flag=True, help="Set bad frames aside, counted and listed, instead of stopping.")
@click.option("--trust-pickle", is_flag=True, help="Load sources of pickles, which can run any code that is in them.")
@click.option("--workers", default=1, metavar="N", help="Processes that share the work; under mpirun, its ranks do.")
def convert_command(
    sources: tuple[Path, ...],
    tasks: tuple[str, ...],
    out: Path,
    preset: str | None,
    format_name: str | None,
    config: Path | None,
    skip_bad: bool,
    trust_pickle: bool,
    workers: int,
) -> None:
    """Convert labelled structures into WebDataset shards of one task."""
    from hydrazero.launch.cli.convert_progress import convert_with_progress
    from hydrazero.shards.convert.settings import load_convert_settings

    if len(tasks) > 1:
        raise ConfigError(f"--task is given {len(tasks)} times ({', '.join(tasks)}); a conversion makes one task.")
    if not tasks and preset is None:
        raise ConfigError("neither --task nor --preset is given; name the task.")
    settings = load_convert_settings(config, format_name, preset=preset)
    convert_with_progress(
        sources,
        tasks[0] if tasks else str(preset),
        out,
        settings,
        workers=workers,
        skip_bad=skip_bad,
        trust_pickle=trust_pickle,
    )


@click.command("subset")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--out", required=True, metavar="DIR", type=FOLDER, help="New folder for the shards.")
@click.option("--train", type=click.IntRange(1), metavar="N", help="Training structures; all if not given.")
@click.option("--val", type=click.IntRange(0), metavar="N", help="Validation structures; all if not given.")
@click.option("--test", type=click.IntRange(0), metavar="N", help="Test structures; all if not given.")
@click.option("--seed", default=0, show_default=True, help="Of the shuffle whose first structures are taken.")
def subset_command(folder: Path, out: Path, train: int | None, val: int | None, test: int | None, seed: int) -> None:
    """Make shards of a part of a task's structures, say for a learning curve.

    Of one seed, a smaller part is in a larger one.
    """
    from hydrazero.launch.cli.convert_progress import shown_splits
    from hydrazero.shards.convert.subset import write_subset

    wanted = {"train": train, "val": val, "test": test}
    counts = {split: count for split, count in wanted.items() if count is not None}
    manifest = write_subset(folder, out, counts, seed)
    click.echo(f"{out}: {shown_splits(manifest)}")
