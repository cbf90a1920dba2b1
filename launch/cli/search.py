"""The command `search`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.launch.cli.options import FOLDER
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.text.foreign_text import echo


@click.command("search")
@click.argument("space", metavar="SPACE.toml", type=FOLDER)
@click.option(
    "--trials",
    type=click.IntRange(1),
    metavar="N",
    help="Number of trials in total, including those of earlier starts and other machines.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of trials that are trained at the same time on this machine.",
)
@click.option("--report", is_flag=True, help="Train nothing; write the page and print the best trials found so far.")
def search_command(space: Path, trials: int | None, workers: int, report: bool) -> None:
    """Search for good training settings with many short runs.

    SPACE.toml lists the settings to vary. Each trial is a short run, and only the better ones are continued. The same
    command continues a search that was interrupted. Started on several machines, or in several Slurm jobs, with a
    shared folder, all of them work on the same search. Trials that fail are recorded but do not count.
    """
    from hydrazero.trainer.search.campaign import begin, check_ended, run_workers
    from hydrazero.trainer.search.journal import open_journal
    from hydrazero.trainer.search.space import read_space, require_optuna
    from hydrazero.trainer.search.tables import print_best

    if report:
        require_optuna()
        journal, statuses = open_journal(read_space(space).out), []
    elif trials is None:
        raise ConfigError("the number of trials is missing; give it with --trials N.")
    else:
        journal = begin(space)
        statuses = run_workers(journal, trials, workers)
    if print_best(journal):
        from hydrazero.trainer.report.search_page import write_search_page

        echo(str(write_search_page(journal)))
    if statuses and trials is not None:
        check_ended(journal, trials, statuses)
