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
def convert_command(
    sources: tuple[Path, ...],
    tasks: tuple[str, ...],
    out: Path,
    format_name: str | None,
    config: Path | None,
    skip_bad: bool,
) -> None:
    """Convert labelled structures into WebDataset shards of one task."""
    from time import monotonic

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from hydrazero.shards.convert import convert
    from hydrazero.shards.convert_settings import load_convert_settings

    if len(tasks) > 1:
        raise ConfigError(f"--task is given {len(tasks)} times ({', '.join(tasks)}); a conversion makes one task.")
    settings = load_convert_settings(config, format_name)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} frames, {task.fields[rate]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=None, rate="")
        started, done = monotonic(), 0

        # Called for every frame: rich's own estimate of the speed would cost as much as the conversion.
        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.update(bar, advance=count, rate=f"{done / max(monotonic() - started, 1e-6):,.0f} frames/s")

        manifest = convert(sources, tasks[0], out, settings, skip_bad=skip_bad, progress=advance)
    counts = ", ".join(f"{split} {manifest.structures(split):,}" for split in manifest.splits)
    click.echo(f"{out}: {manifest.structures():,} structures ({counts})")
    if manifest.duplicate_count:
        what = "left out" if settings.duplicates == "drop" else "kept, in the split of the first"
        click.echo(f"duplicates: {manifest.duplicate_count:,} frames repeat an earlier geometry ({what})")
    for reason, count in manifest.set_aside.items():
        click.echo(f"set aside, {reason}: {count:,}")
    untrained = sorted(set(manifest.elements) - set(manifest.trained_elements))
    if untrained:
        click.echo(f"warning: no training structure holds {', '.join(untrained)}; they get no reference energy")


@click.command("inspect")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, for programs.")
@click.option("--verify", is_flag=True, help="Also compare every shard's SHA-256 with the manifest.")
def inspect_command(folder: Path, as_json: bool, verify: bool) -> None:
    """Show what a shard folder holds."""
    import json

    from rich.console import Console

    from hydrazero.shards.inspection import describe, manifest_facts
    from hydrazero.shards.manifest import check_shard_files, read_manifest

    manifest = read_manifest(folder)
    check_shard_files(manifest, folder, checksums=verify)
    if as_json:
        click.echo(json.dumps(manifest_facts(manifest), indent=1))
        return
    Console().print(describe(manifest))
    if verify:
        click.echo("every shard has the checksum that the manifest says")
