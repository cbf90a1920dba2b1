"""The command `train`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.launch.cli.options import FOLDER, ranks_option, set_option
from hydrazero.shards.text.foreign_text import echo


@click.command("train")
@click.argument("run_file", metavar="RUN.toml", type=FOLDER)
@ranks_option
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Number of threads of each training process.  [default: OMP_NUM_THREADS, or the cores divided by the ranks]",
)
@set_option
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint; the number of ranks may have changed.")
@click.option(
    "--retries",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="How often the run is restarted from its last checkpoint if a rank is killed or lost.",
)
@click.option(
    "--dry-run",
    "rehearsal",
    flag_value="dry-run",
    help="Check files, elements, labels, batch size, memory and DeepSpeed settings, compute two training steps and one "
    "validation batch, and estimate the time of the run. Nothing is written.",
)
@click.option(
    "--profile",
    "rehearsal",
    flag_value="profile",
    help="Profile five steps after five warm-up steps, write RUN/profile/trace-rankN.json (for chrome://tracing or "
    "Perfetto) and print the ten most expensive operations. An existing run is not changed.",
)
def train_command(
    run_file: Path,
    ranks: int,
    threads: int | None,
    overrides: tuple[str, ...],
    resume: bool,
    retries: int,
    rehearsal: str | None,
) -> None:
    """Train the model that RUN.toml describes.

    The run folder, 'run.out' in RUN.toml, receives checkpoints, metrics and logs. 'hydrazero init' writes a run file
    for given shards.
    """
    from hydrazero.trainer.config.run_file import load_run_config
    from hydrazero.trainer.ranks.launcher import train_ranks
    from hydrazero.trainer.records.run_files import RUN_NAME
    from hydrazero.trainer.rehearsal.rehearse import check_rehearsal, rehearse
    from hydrazero.trainer.train import TrainOptions, train_here, use_threads

    config = load_run_config(run_file, overrides)
    options = [word for override in overrides for word in ("--set", override)] + ["--resume"] * resume
    if rehearsal is None:
        started = TrainOptions(ranks=ranks, words=options, resume=resume, retries=retries, threads=threads)
        echo(train_here(run_file, config, started))
        return
    check_rehearsal(rehearsal, config, resume)
    if ranks == 1:
        use_threads(threads)
        rehearse(rehearsal, config, resume)
    else:
        words, record = [*options, f"--{rehearsal}"], Path(config.run.out) / RUN_NAME
        train_ranks(run_file, ranks, words, record, threads=threads)
