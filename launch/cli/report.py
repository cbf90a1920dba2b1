"""Commands on run folders: report."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="File to write.  [default: RUN_DIR/report.html; comparison.html for several runs]",
)
def report_command(run_dirs: tuple[Path, ...], out: Path | None) -> None:
    """Write one self-contained page with pictures of a run, or of several side by side.

    The runs may still be in progress; what is there is shown.
    """
    from hydrazero.trainer.report import write_report

    click.echo(str(write_report(run_dirs, out)))
