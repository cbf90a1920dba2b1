"""Commands on run folders: report."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
def report_command(run_dir: Path) -> None:
    """Write RUN_DIR/report.html: one self-contained page with pictures."""
    from hydrazero.trainer.report import write_report

    click.echo(str(write_report(run_dir)))
