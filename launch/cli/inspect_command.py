"""The command `inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hydrazero.launch.cli.options import FOLDER
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.text.foreign_text import echo, escaped_json

if TYPE_CHECKING:
    from hydrazero.shards.manifest import Manifest


@click.command("inspect")
@click.argument("folders", metavar="DIR...|MODEL", nargs=-1, required=True, type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, for programs.")
@click.option("--html", "page", metavar="FILE", type=FOLDER, help="Write an HTML page with plots.")
@click.option("--verify", is_flag=True, help="Also compare the SHA-256 checksum of every shard with the manifest.")
@click.option(
    "--propose-batch",
    is_flag=True,
    help="Print a section [batch] for a run file that trains on these shards and fits into memory.",
)
@click.option(
    "--cutoff",
    default=5.0,
    metavar="Å",
    show_default=True,
    help="Cutoff radius of the neighbours that are shown, and of the batch.",
)
@click.option(
    "--structures",
    default=32,
    metavar="N",
    show_default=True,
    help="For --propose-batch: number of structures in a batch.",
)
@click.option(
    "--temperature",
    default=1.0,
    metavar="T",
    show_default=True,
    help="For --propose-batch: data.temperature of the run, which sets the mixture of tasks.",
)
@click.option(
    "--memory",
    metavar="GB",
    type=float,
    help="For --propose-batch: memory of each rank.  [default: what is free on this machine]",
)
@click.option(
    "--run", "run_file", metavar="FILE", type=FOLDER, help="For --propose-batch: run file with the section [model]."
)
def inspect_command(
    folders: tuple[Path, ...], as_json: bool, page: Path | None, verify: bool, propose_batch: bool, **batch: Any
) -> None:
    """Show what shard folders or an exported model contain.

    One shard folder is described in detail; several are compared side by side. For an exported model, the model card is
    shown.
    """
    models = [path for path in folders if path.is_file() or path.suffix == ".safetensors"]
    if models:
        if len(folders) > 1 or page or verify or propose_batch:
            raise ConfigError(f"{models[0]} is a model; inspect it alone, with no option other than --json.")
        _show_model(models[0], as_json)
        return
    manifests = _checked_manifests(folders, verify)
    if propose_batch:
        from hydrazero.trainer.propose.propose_batch import BatchRequest, batch_text

        echo(batch_text(BatchRequest(folders=folders, **batch)))
        return
    _show(manifests, f"{batch['cutoff']:g}", as_json, page)
    if verify and not as_json:
        echo("all shards have the checksums of their manifests")


def _checked_manifests(folders: Sequence[Path], verify: bool) -> list[Manifest]:
    """Return the folders' manifests; raise ConfigError or ShardError for what is not a set of complete shards."""
    from hydrazero.shards.manifest import check_different_tasks, check_shard_files, read_manifest
    from hydrazero.trainer.records.run_files import RUN_NAME

    for run in (path for path in folders if (path / RUN_NAME).is_file()):
        raise ConfigError(f"{run} is a run, which 'hydrazero report {run}' shows; inspect is for shards and models.")
    manifests = [read_manifest(folder) for folder in folders]
    check_different_tasks(manifests, folders)
    for manifest, folder in zip(manifests, folders, strict=True):
        check_shard_files(manifest, folder, checksums=verify)
    return manifests


def _show(manifests: Sequence[Manifest], cutoff: str, as_json: bool, page: Path | None) -> None:
    """Print the facts as JSON or as tables, or write them to a page."""
    from hydrazero.launch.cli.views.shards_view import describe, describe_several, manifest_facts
    from hydrazero.shards.text.terminal import PlainConsole

    if as_json:
        facts = [manifest_facts(manifest) for manifest in manifests]
        echo(json.dumps(facts[0] if len(facts) == 1 else facts, indent=1))
    elif page is None:
        PlainConsole().print(describe(manifests[0]) if len(manifests) == 1 else describe_several(manifests, cutoff))
    if page is not None:
        from hydrazero.launch.cli.views.inspect_page import write_page

        write_page(manifests, cutoff, page)
        echo(str(page))


def _show_model(path: Path, as_json: bool) -> None:
    """Print the card of a model file."""
    from hydrazero.launch.cli.views.model_card_view import card_of, describe_model
    from hydrazero.trainer.records.progress_line import wide_console

    if as_json:
        echo(escaped_json(json.dumps(card_of(path), indent=1, ensure_ascii=False)))
    else:
        wide_console(stderr=False).print(describe_model(path))
