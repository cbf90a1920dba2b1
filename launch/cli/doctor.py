"""The command `doctor`."""

from __future__ import annotations

import json

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, for programs.")
def doctor_command(as_json: bool) -> None:
    """Report versions, devices and missing parts of this machine.

    Please add the report to a bug report. It lists what is installed, whether PyTorch, DeepSpeed, MPI and the CPU
    kernels work, and which parts of hydrazero cannot be used, with the commands that install what is missing.
    """
    from hydrazero.launch.doctor.report import examine, report_json, report_text

    sections = examine()
    click.echo(json.dumps(report_json(sections), indent=1, ensure_ascii=False) if as_json else report_text(sections))
