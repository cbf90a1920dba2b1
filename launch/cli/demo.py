"""The command `demo`."""

from __future__ import annotations

from pathlib import Path

import click

from hydrazero.launch.cli.options import FOLDER


@click.command("demo")
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR", type=FOLDER, help="Results folder.")
def demo_command(out: Path) -> None:
    """Try everything in minutes: label, train, evaluate, screen.

    The structures are generated and labelled with fast methods, so that no data is needed.
    """
    from hydrazero.trainer.demo.demo import run_demo

    run_demo(out)
