"""The command `init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hydrazero.launch.cli.options import FOLDER
from hydrazero.shards.text.foreign_text import echo


@click.command("init")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--out", required=True, metavar="RUN.toml", type=FOLDER, help="Run file to write; the run folder is named after it."
)
@click.option(
    "--encoder",
    default="painn",
    show_default=True,
    metavar="NAME",
    help="Encoder of the model: painn, schnet, egnn, pna_eq, dimenetpp, mace, tensornet, lace, or one that an "
    "installed package adds.",
)
@click.option(
    "--size", default="small", show_default=True, metavar="NAME", help="Size of the model: tiny, small, base or large."
)
@click.option("--cutoff", default=5.0, show_default=True, metavar="Å", help="Cutoff radius of the neighbours.")
@click.option("--hours", default=1.0, show_default=True, metavar="H", help="Time that the training may take.")
@click.option(
    "--ranks",
    type=click.IntRange(1),
    metavar="N",
    help="Number of training processes.  [default: one per GPU; on a CPU the fastest of 1, 2 and 4 in a measurement]",
)
def init_command(folders: tuple[Path, ...], **options: Any) -> None:
    """Write a commented run file for training on shard folders.

    Each DIR holds the shards of one task, written by 'hydrazero convert'. The batch is chosen by the sizes of the
    structures and the memory of this machine; the number of steps by the time of a few steps, which are measured here.
    On a CPU they are measured with several numbers of processes and threads, unless --ranks or OMP_NUM_THREADS is
    given; the fastest are named in the command that is printed, and in the run file. This takes from some seconds to
    a few minutes, in which nothing else should run.
    """
    from hydrazero.trainer.propose.propose_run import InitRequest, write_run_file

    write_run_file(InitRequest(folders=folders, **options), echo)
