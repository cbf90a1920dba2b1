"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.launch.cli.options import FOLDER
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.location import Location
from hydrazero.shards.text.foreign_text import echo


@click.command("evaluate")
@click.argument("run_or_model", metavar="RUN|MODEL", type=FOLDER)
@click.argument("folders", metavar="[DIR]...", nargs=-1, type=FOLDER)
@click.option(
    "--split", default="test", show_default=True, metavar="NAME", help="Split of the shards: train, val or test."
)
@click.option(
    "--out",
    metavar="DIR",
    type=FOLDER,
    help="Folder for evaluation.json and predictions/.  [default: the run folder; MODEL.evaluation.json for a model]",
)
def evaluate_command(run_or_model: Path, folders: tuple[Path, ...], split: str, out: Path | None) -> None:
    """Measure the errors of a run or an exported model on shards.

    A run is evaluated on its own shards unless other folders are named.
    """
    from hydrazero.shards.files import check_writable
    from hydrazero.trainer.evaluation.evaluate import check_no_commands, evaluate, open_run_or_model, results_in
    from hydrazero.trainer.evaluation.tables import print_evaluation
    from hydrazero.trainer.records.run_log import progress_bar

    potential, own_folders, files = open_run_or_model(run_or_model)
    if not folders and not own_folders:
        raise ConfigError("name the shard folders to evaluate the model on: hydrazero evaluate MODEL DIR...")
    files = files if out is None else results_in(out, files.step)
    check_writable(files.evaluation.parent, "name another with --out")
    if not folders:
        check_no_commands(run_or_model, own_folders)
    chosen, total = _with_structures(list(folders) or list(own_folders), split)
    bar, advance = progress_bar("evaluating", total)
    with bar:
        evaluation = evaluate(potential, chosen, split, files, advance)
    print_evaluation(evaluation)


def _with_structures(folders: list[Location], split: str) -> tuple[list[Location], int]:
    """Return the folders that have structures in the split, or all if none has, and the number of structures."""
    from hydrazero.shards.manifest import read_manifest

    counts = {folder: read_manifest(folder).structures(split) for folder in folders}
    if not any(counts.values()):
        return folders, 0  # the evaluation reports it
    for folder in (folder for folder, count in counts.items() if not count):
        echo(f"warning: {folder} has no structures in the split '{split}' and is left out.", err=True)
    return [folder for folder in folders if counts[folder]], sum(counts.values())
