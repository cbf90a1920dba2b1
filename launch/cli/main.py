"""The command line: `hydrazero COMMAND`. Imports that cost time are inside the commands, so that help comes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hydrazero.launch.cli.convert import convert_command, subset_command
from hydrazero.launch.cli.finetune import finetune_command
from hydrazero.launch.cli.inspect_command import inspect_command
from hydrazero.launch.cli.launch import launch_command, postmortem_command
from hydrazero.launch.cli.plan import plan_command
from hydrazero.launch.cli.report import report_command
from hydrazero.launch.cli.screen import screen_command, task_list
from hydrazero.launch.cli.search import search_command
from hydrazero.shards.errors import ConfigError, HydrazeroError

FOLDER = click.Path(path_type=Path)


class HydrazeroGroup(click.Group):
    """A group whose commands end with one sentence, not a traceback, when the user's input is at fault."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; HydrazeroError becomes 'Error: ...' and its exit status, 1 for errors of users."""
        try:
            return super().invoke(ctx)
        except HydrazeroError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_status)


@click.group(cls=HydrazeroGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="hydrazero")
def main() -> None:
    """Train, export and use many-headed atomistic models."""


main.add_command(convert_command)
main.add_command(subset_command)
main.add_command(finetune_command)
main.add_command(inspect_command)
main.add_command(launch_command)
main.add_command(postmortem_command)
main.add_command(plan_command)
main.add_command(report_command)
main.add_command(screen_command)
main.add_command(search_command)


@main.command()
@click.argument("run_file", metavar="RUN.toml", type=FOLDER)
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1), help="Processes on this machine.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value of the run file."
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the run, with any number of ranks.")
@click.option(
    "--retries",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Times that the run starts again from its last checkpoint when a rank is killed or lost.",
)
@click.option(
    "--dry-run",
    "rehearsal",
    flag_value="dry-run",
    help="Check files, elements, labels, batch, memory and DeepSpeed settings, do two steps and a batch of the "
    "validation, say what the run will take; nothing is written.",
)
@click.option(
    "--profile",
    "rehearsal",
    flag_value="profile",
    help="Profile five steps after five others, write RUN/profile/trace-rankN.json (for chrome://tracing or Perfetto), "
    "print the ten dearest operations and stop. The run itself is not started, and one that is there is left as it is.",
)
def train(
    run_file: Path, ranks: int, overrides: tuple[str, ...], resume: bool, retries: int, rehearsal: str | None
) -> None:
    """Train what RUN.toml describes."""
    from hydrazero.trainer.config.run_file import load_run_config
    from hydrazero.trainer.ranks.launcher import train_ranks
    from hydrazero.trainer.records.run_files import RUN_NAME
    from hydrazero.trainer.rehearsal.rehearse import check_rehearsal, rehearse
    from hydrazero.trainer.train import TrainOptions, train_here

    config = load_run_config(run_file, overrides)
    options = [word for override in overrides for word in ("--set", override)] + ["--resume"] * resume
    if rehearsal is not None:
        check_rehearsal(rehearsal, config, resume)
        if ranks == 1:
            rehearse(rehearsal, config, resume)
        else:
            train_ranks(run_file, ranks, [*options, f"--{rehearsal}"], Path(config.run.out) / RUN_NAME)
        return
    click.echo(train_here(run_file, config, TrainOptions(ranks=ranks, words=options, resume=resume, retries=retries)))


@main.command()
@click.argument("run_or_model", type=FOLDER)
@click.argument("folders", metavar="[DIR]...", nargs=-1, type=FOLDER)
@click.option("--split", default="test", show_default=True, help="train, val or test.")
@click.option(
    "--out",
    type=FOLDER,
    help="Folder for evaluation.json and predictions/. [default: the run's; MODEL.evaluation.json]",
)
def evaluate(run_or_model: Path, folders: tuple[Path, ...], split: str, out: Path | None) -> None:
    """Measure a run's or an exported model's errors on shards.

    A run is evaluated on its own shards unless others are named.
    """
    from hydrazero.shards.manifest import read_manifest
    from hydrazero.trainer.evaluation.evaluate import evaluate as evaluate_potential
    from hydrazero.trainer.evaluation.evaluate import open_run_or_model, results_in
    from hydrazero.trainer.evaluation.tables import print_evaluation
    from hydrazero.trainer.records.run_log import progress_bar

    potential, own_folders, files = open_run_or_model(run_or_model)
    chosen = list(folders) or own_folders
    if not chosen:
        raise ConfigError("name the shard folders to evaluate the model on: hydrazero evaluate MODEL DIR...")
    counts = {folder: read_manifest(folder).structures(split) for folder in chosen}
    if any(counts.values()):  # else the evaluation refuses
        chosen = [folder for folder in chosen if counts[folder]]
        for folder in (folder for folder, count in counts.items() if not count):
            click.echo(f"warning: {folder} has no structures in the split '{split}'; it is left out.", err=True)
    total = sum(counts.values())
    bar, advance = progress_bar("evaluating", total)
    with bar:
        files = files if out is None else results_in(out)
        document = evaluate_potential(potential, chosen, split, files, advance)
    print_evaluation(document)


@main.command()
@click.argument("run_dir", type=FOLDER)
@click.option("--out", required=True, metavar="MODEL.safetensors", type=FOLDER, help="File to write.")
@click.option("--tasks", metavar="A,B", help="Heads to export; all by default.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float64.")
@click.option(
    "--old-heads", is_flag=True, help="Also the heads of the model that the run started from which it has not trained."
)
def export(run_dir: Path, out: Path, tasks: str | None, dtype: str, old_heads: bool) -> None:
    """Write the model of a run's best checkpoint as one safetensors file, with a card that 'inspect' shows.

    The card has test errors if the run was evaluated before.
    """
    from hydrazero.trainer.evaluation.export import export_run

    model = export_run(run_dir, out, task_list(tasks), dtype, old_heads=old_heads)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB, tasks {', '.join(task.name for task in model.tasks)}")


@main.command()
@click.argument("model", type=FOLDER)
@click.option("--task", required=True, help="The head to compile.")
@click.option("--out", required=True, metavar="FILE.pt2", type=FOLDER, help="File to write.")
def package(model: Path, task: str, out: Path) -> None:
    """Compile one head of MODEL.safetensors ahead of time, for PyTorch without hydrazero.

    The package is for this kind of processor and this version of PyTorch; it takes one to two minutes.
    """
    from hydrazero.models.inference.aot_package import write_package
    from hydrazero.models.inference.model_file import read_card, read_model, with_tasks

    write_package(with_tasks(read_model(model), [task]), out, read_card(model))
    click.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB, task {task}")


@main.command()
@click.option("--out", default="runs/demo", show_default=True, type=FOLDER, help="Folder for everything that it makes.")
def demo(out: Path) -> None:
    """Show the whole way in minutes: label, train, evaluate, export, relax, screen."""
    from hydrazero.trainer.demo.demo import run_demo

    run_demo(out)
