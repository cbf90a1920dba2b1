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
