"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.shards.errors import ConfigError


@click.command("inspect")
@click.argument("folders", metavar="DIR...|MODEL", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, for programs.")
@click.option("--html", "page", metavar="FILE", type=click.Path(path_type=Path), help="Write them as a page.")
@click.option("--verify", is_flag=True, help="Also compare every shard's SHA-256 with the manifest.")
@click.option("--propose-batch", is_flag=True, help="Propose [batch] for a run on these tasks, for the memory at hand.")
@click.option("--cutoff", default=5.0, metavar="Å", show_default=True, help="Of the neighbours shown, and the batch.")
@click.option("--structures", default=32, metavar="N", show_default=True, help="Structures wanted in a batch.")
@click.option("--temperature", default=1.0, metavar="T", show_default=True, help="Of the mixture, for the batch.")
@click.option("--memory", metavar="GB", type=float, help="Of each rank, for the batch; what is free if not given.")
@click.option("--run", "run_file", metavar="FILE", type=click.Path(path_type=Path), help="Run file with the model.")
def inspect_command(
    folders: tuple[Path, ...],
    as_json: bool,
    page: Path | None,
    verify: bool,
    propose_batch: bool,
    cutoff: float,
    structures: int,
    temperature: float,
    memory: float | None,
    run_file: Path | None,
) -> None:
    """Show what shard folders hold, one in full, several side by side, or the card of an exported model."""
    import json

    from rich.console import Console

    from hydrazero.launch.cli.shards_view import describe, describe_several, manifest_facts
    from hydrazero.shards.manifest import check_shard_files, read_manifest
    from hydrazero.trainer.records.run_files import RUN_NAME

    models = [path for path in folders if path.is_file() or path.suffix == ".safetensors"]
    if models:
        if len(folders) > 1 or page or verify or propose_batch:
            raise ConfigError(f"{models[0]} is a model; it is shown alone, and with no option but --json.")
        _show_model(models[0], as_json)
        return
    for run in (path for path in folders if (path / RUN_NAME).is_file()):
        raise ConfigError(f"{run} is a run, which 'hydrazero report {run}' shows; inspect is for shards and models.")
    manifests = [read_manifest(folder) for folder in folders]
    names = [manifest.task for manifest in manifests]
    for name, folder in zip(names, folders, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"two of the folders hold a task '{name}' ({folder}); a run needs names that differ.")
    for manifest, folder in zip(manifests, folders, strict=True):
        check_shard_files(manifest, folder, checksums=verify)
    if propose_batch:
        from hydrazero.trainer.cost.step_memory import proposal

        click.echo(proposal(folders, cutoff, structures, temperature, memory, run_file))
        return
    if as_json:
        facts = [manifest_facts(manifest) for manifest in manifests]
        click.echo(json.dumps(facts[0] if len(facts) == 1 else facts, indent=1))
    elif page is None:
        console = Console()
        console.print(describe(manifests[0]) if len(manifests) == 1 else describe_several(manifests, f"{cutoff:g}"))
    if page is not None:
        from hydrazero.launch.cli.inspect_page import write_page

        write_page(manifests, f"{cutoff:g}", page)
        click.echo(f"{page}")
    if verify and not as_json:
        click.echo("every shard has the checksum that the manifest says")


def _show_model(path: Path, as_json: bool) -> None:
    import json

    from hydrazero.launch.cli.model_card_view import card_of, describe_model
    from hydrazero.trainer.records.progress_line import wide_console

    if as_json:
        click.echo(json.dumps(card_of(path), indent=1, ensure_ascii=False))
    else:
        wide_console(stderr=False).print(describe_model(path))
