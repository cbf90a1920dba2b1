"""The commands `convert` and `subset`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hydrazero.launch.cli.options import FOLDER, GivenOnce
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.text.foreign_text import echo


def _list_presets(context: click.Context, _: Any, requested: bool) -> None:
    """Print the presets and exit."""
    if not requested:
        return
    from hydrazero.shards.convert.presets import load_preset, preset_names

    for name in preset_names():
        about = load_preset(name).about
        click.secho(name, bold=True)
        for fact in (about.title, f"{about.theory}; {about.elements}", about.layout, about.download):
            echo(f"    {fact}")
    context.exit()


def _list_formats(context: click.Context, _: Any, requested: bool) -> None:
    """Print the formats that can be read, with the suffixes by which they are guessed, and exit."""
    if not requested:
        return
    from hydrazero.shards.readers import READERS, reader_of

    for name in READERS.names():
        package = READERS.package_of(name)
        origin = "" if package is None else f" (package {package.name})"
        echo(f"{name:14}{' '.join(reader_of(name).suffixes)}{origin}".rstrip())
    context.exit()


@click.command("convert")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=FOLDER)
@click.option("--task", cls=GivenOnce, metavar="NAME", help="Name of the task.  [default: the preset's name]")
@click.option("--out", required=True, metavar="DIR", type=FOLDER, help="New folder for the shards.")
@click.option("--preset", metavar="NAME", help="Use the settings of a well-known dataset.")
@click.option(
    "--list-presets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_presets,
    help="List the presets and exit.",
)
@click.option(
    "--list-formats",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_formats,
    help="List the formats with the suffixes that stand for them, and exit.",
)
@click.option("--format", "format_name", metavar="NAME", help="Format of the sources.  [default: by their suffixes]")
@click.option(
    "--config",
    metavar="FILE",
    type=FOLDER,
    help="TOML file with field names, units, splits, the selection of structures and the level of theory.",
)
@click.option("--skip-bad", is_flag=True, help="Skip and list unusable structures instead of stopping at the first.")
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Allow sources that contain Python pickles. Loading a pickle can run any code that is in it.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    metavar="N",
    help="Number of processes that share the work. Under mpirun, the MPI ranks share it instead.",
)
def convert_command(sources: tuple[Path, ...], task: str | None, out: Path, **options: Any) -> None:
    """Convert labelled structures into the shards of one task.

    SOURCEs are files or folders in a supported format: extended XYZ, ASE databases, HDF5, LMDB, NumPy, JSON and others.
    The shards are WebDataset tar files with a manifest, split into training, validation and test structures.
    """
    from hydrazero.launch.cli.views.convert_progress import convert_with_progress
    from hydrazero.shards.convert.settings import load_convert_settings

    preset = options["preset"]
    if task is None and preset is None:
        raise ConfigError("neither --task nor --preset is given; name the task.")
    convert_with_progress(
        sources,
        str(preset) if task is None else task,
        out,
        load_convert_settings(options["config"], options["format_name"], preset=preset),
        workers=options["workers"],
        skip_bad=options["skip_bad"],
        trust_pickle=options["trust_pickle"],
    )


@click.command("subset")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--out", required=True, metavar="DIR", type=FOLDER, help="New folder for the shards.")
@click.option("--train", type=click.IntRange(1), metavar="N", help="Number of training structures.  [default: all]")
@click.option("--val", type=click.IntRange(0), metavar="N", help="Number of validation structures.  [default: all]")
@click.option("--test", type=click.IntRange(0), metavar="N", help="Number of test structures.  [default: all]")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of the random selection.")
def subset_command(folder: Path, out: Path, train: int | None, val: int | None, test: int | None, seed: int) -> None:
    """Write the shards of a random subset of a task's structures.

    This is useful for a learning curve, for example. With the same seed, a smaller subset is always contained in a
    larger one.
    """
    from hydrazero.launch.cli.views.convert_progress import shown_splits
    from hydrazero.shards.convert.subset import write_subset

    requested = {"train": train, "val": val, "test": test}
    counts = {split: count for split, count in requested.items() if count is not None}
    manifest = write_subset(folder, out, counts, seed)
    echo(f"{out}: {shown_splits(manifest)}")
