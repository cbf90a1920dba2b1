"""The command `search`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.shards.errors import ConfigError


@click.command("search")
@click.argument("space", metavar="SPACE.toml", type=click.Path(path_type=Path))
@click.option("--trials", type=click.IntRange(1), metavar="N", help="Trials, of all workers and restarts together.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Trials trained at a time here.")
@click.option("--report", is_flag=True, help="Only write the page and print the best trials, of what is there.")
def search_command(space: Path, trials: int | None, workers: int, report: bool) -> None:
    """Search for good settings: many short runs, of which the better ones go on.

    The same command goes on with a search that was stopped. Started on several machines, or in several Slurm jobs, it
    works on one search, whose folder they must share. Trials that fail are noted and not counted.
    """
    from hydrazero.trainer.search.campaign import begin, check_ended, run_workers
    from hydrazero.trainer.search.journal import open_journal
    from hydrazero.trainer.search.space import read_space, require_optuna
    from hydrazero.trainer.search.tables import print_best

    if report:
        require_optuna()
        journal, statuses = open_journal(read_space(space).out), []
    elif trials is None:
        raise ConfigError("say how many trials there shall be: --trials N.")
    else:
        journal = begin(space)
        statuses = run_workers(journal, trials, workers)
    if print_best(journal):
        from hydrazero.trainer.report.search_page import write_search_page

        click.echo(str(write_search_page(journal)))
    if statuses and trials is not None:
        check_ended(journal, trials, statuses)
