"""The command `screen`; launchers start a rank of it with `python -m hydrazero.launch.cli.screen`."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from hydrazero.launch.cli.options import FOLDER, task_list
from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.text.foreign_text import echo

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


@click.command("screen")
@click.argument("model", metavar="MODEL", type=FOLDER)
@click.argument("sources", metavar="[SOURCE]...", nargs=-1, type=FOLDER)
@click.option(
    "--out",
    required=True,
    metavar="DIR|FILE.parquet",
    type=FOLDER,
    help="File to write, or new folder for several files.",
)
@click.option(
    "--generate",
    multiple=True,
    metavar="FILE.toml",
    type=FOLDER,
    help="Also screen generated structures: prototypes x elements x strains. May be given several times.",
)
@click.option("--tasks", metavar="A,B", help="Heads to use; the first one ranks.  [default: all]")
@click.option("--forces", "with_forces", is_flag=True, help="Also predict forces with the first head.")
@click.option("--forces-of", metavar="A,B", help="Also predict forces with these heads.")
@click.option("--top", type=click.IntRange(1), metavar="K", help="Keep only the K structures that rank lowest.")
@click.option(
    "--by",
    default="",
    metavar="EXPR",
    help="Expression of columns to rank by, for example 'abs(energy_a - energy_b) / atoms'.",
)
@click.option(
    "--relax",
    default=0,
    metavar="STEPS",
    type=click.IntRange(0),
    help="Relax each structure first, with the first head and at most this number of steps.",
)
@click.option(
    "--max-atoms",
    default=10_000,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Do not compute structures with more atoms.",
)
@click.option(
    "--bf16", is_flag=True, help="Compute the encoder's matrix products in bfloat16: faster, energies within about 1%."
)
@click.option(
    "--config", metavar="FILE", type=FOLDER, help="TOML file of 'hydrazero convert' that says how to read the sources."
)
@click.option("--format", "format_name", metavar="NAME", help="Format of the sources.  [default: by their suffixes]")
@click.option(
    "--ranks", type=click.IntRange(1), metavar="N", help="Number of processes on this machine that share the work."
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="Number of reading processes per rank.",
)
@click.option(
    "--batch-atoms",
    type=click.IntRange(1),
    metavar="N",
    help="Number of atoms in a batch.  [default: chosen for the device]",
)
@click.option("--launched-by", default=None, type=int, hidden=True)  # the process id of `hydrazero screen --ranks`
@click.option("--local_rank", "--local-rank", default=None, type=int, hidden=True)  # DeepSpeed's launcher passes it
def screen_command(ranks: int | None, launched_by: int | None, local_rank: int | None, **options: Any) -> None:
    """Predict the properties of many structures with a model.

    MODEL is an exported model; SOURCEs are structure files or shard folders. The same command continues a screen that
    was interrupted. Under a launcher (deepspeed, srun, mpirun) the ranks share the work.
    """
    if ranks is not None and ranks > 1:
        _start_ranks(ranks)
        return
    from hydrazero.launch.screen_files import ScreenRequest, screen_files
    from hydrazero.shards.processes import end_with_parent
    from hydrazero.trainer.ranks.exit_status import FAILED

    if launched_by is not None:
        end_with_parent(launched_by, FAILED)
    for name in ("tasks", "forces_of"):
        options[name] = tuple(task_list(options[name]) or ())
    screen_files(ScreenRequest(**options), echo)


def _start_ranks(ranks: int) -> None:
    """Start this command as several ranks; raise HydrazeroError or SystemExit if one of them fails."""
    from hydrazero.trainer.ranks.launcher import Ranks

    words = sys.argv[2:] if sys.argv[1:2] == ["screen"] else sys.argv[1:]
    rank_command = [sys.executable, "-m", "hydrazero.launch.cli.screen", f"--launched-by={os.getpid()}"]
    with Ranks([*rank_command, *without_ranks(words)], ranks) as running:
        outcome = running.wait()
    if running.interrupted:
        raise KeyboardInterrupt
    if outcome.status == 1:
        raise SystemExit(1)
    if outcome.status:
        raise HydrazeroError(f"{outcome.reason}; the same command continues the screen.")


def without_ranks(words: list[str]) -> list[str]:
    """Return a command line without `--ranks N`."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--ranks" and not word.startswith("--ranks="):
            kept.append(word)
        skip = word == "--ranks"
    return kept


def main() -> None:
    """Screen as one rank; report errors of users in one sentence."""
    from hydrazero.trainer.ranks.exit_status import end_process_after

    end_process_after(lambda: screen_command(standalone_mode=False), interrupted=INTERRUPTED)


if __name__ == "__main__":
    main()
