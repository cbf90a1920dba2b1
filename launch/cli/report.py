"""The command `report`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.launch.cli.options import FOLDER
from hydrazero.shards.text.foreign_text import echo


@click.command("report")
@click.argument("run_dirs", metavar="RUN...", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--out",
    type=FOLDER,
    metavar="FILE.html",
    help="File to write.  [default: RUN/report.html; comparison.html for several runs]",
)
def report_command(run_dirs: tuple[Path, ...], out: Path | None) -> None:
    """Write an HTML page with plots of one run or several runs.

    The page needs no other files. Runs may still be in progress.
    """
    from hydrazero.trainer.report import write_report

    echo(str(write_report(run_dirs, out)))
