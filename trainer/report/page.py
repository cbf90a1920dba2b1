"""Writing the report of one run, or of several side by side, to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import check_writable
from hydrazero.trainer.plots.parity import parity_plots
from hydrazero.trainer.records.run_files import REPORT_NAME
from hydrazero.trainer.report.markup import write_page
from hydrazero.trainer.report.one_run import heading, sections
from hydrazero.trainer.report.run_data import read_run, run_labels
from hydrazero.trainer.report.several_runs import comparison

COMPARISON_NAME = "comparison.html"
"""Default name of the report of several runs."""


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of the runs as one HTML file and return its path.

    By default, this is report.html in the folder of one run, or comparison.html in the current folder for several.
    Raise ConfigError if a run's files are missing or damaged.
    """
    default = run_dirs[0] / REPORT_NAME if len(run_dirs) == 1 else Path(COMPARISON_NAME)
    check_writable((out or default).parent, "name another file with --out")
    runs = [read_run(folder, label) for folder, label in zip(run_dirs, run_labels(run_dirs), strict=True)]
    if len(runs) == 1:
        (run,) = runs
        return write_page(run.label, [heading(run), *sections(run)], out or default)
    return write_page(" · ".join(run.label for run in runs), comparison(runs), out or default)


def parity_picture(run_dir: Path, out: Path) -> None:
    """Write the parity plots of a run's evaluation as one PNG."""
    run = read_run(run_dir, run_dir.name)
    if run.no_errors:
        raise ConfigError(f"{run_dir}: {run.no_errors} Run 'hydrazero evaluate {run_dir}' first.")
    parity_plots(run.predictions).savefig(out, dpi=130)
