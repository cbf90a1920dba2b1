"""Name the nodes that have left no answer: `python -m hydrazero.launch.node.silent_nodes --attempt DIR < NAMES`.

A node that hangs before it can say so, or is gone, leaves nothing; the job's script asks for it when a part of what
nodes do before ranks start has failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from hydrazero.launch.node.records import PASSED, UNFIT, add_event, all_events


def silent_nodes(attempt: Path, part: str, nodes: Sequence[str]) -> tuple[list[str], int]:
    """Return the nodes from which there is no answer to a part, and how many of these that is.

    The number is smaller where a node has answered by another name than it is called by in `nodes`.
    """
    answers = [
        row for row in all_events(attempt) if row["event"] == UNFIT or (row["event"] == PASSED and row["part"] == part)
    ]
    known = {row["node"] for row in answers}
    named = known | {row.get("address") for row in answers}
    silent = [node for node in nodes if node not in named and node.split(".")[0] not in known]
    return silent, min(len(nodes) - len(known), len(silent))


@click.command()
@click.option("--attempt", required=True, type=click.Path(path_type=Path), help="Folder of notes.")
@click.option("--part", required=True, help="What the nodes had to do.")
@click.option("--within", required=True, help="Seconds that they had for it.")
def main(attempt: Path, part: str, within: str) -> None:
    """Note for each silent node that it is not fit, with a sentence."""
    silent, count = silent_nodes(attempt, part, sys.stdin.read().split())
    if count <= 0:
        return
    reason = f"no answer to its {part} within {within} s"
    if count < len(silent):
        silent, reason = ["unknown"], f"{count} of {', '.join(silent)} gave {reason}"
    for node in silent:
        click.echo(f"Error: node {node} is not fit: {reason}.", err=True)
        add_event(attempt, node, UNFIT, reason=reason)


if __name__ == "__main__":
    main()
