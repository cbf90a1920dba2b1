"""Name the nodes that have not responded: `python -m hydrazero.launch.node.silent_nodes --attempt DIR < NAMES`.

A node that hangs early or is lost leaves no record. The job's script runs this module when a task that nodes do before
the ranks start has failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from hydrazero.launch.node.records import PASSED, UNFIT, add_event, all_events
from hydrazero.shards.text.foreign_text import echo


def silent_nodes(attempt: Path, part: str, nodes: Sequence[str]) -> tuple[list[str], int]:
    """Return the nodes without a record of a task (`part`), and the number of nodes that have not responded.

    The number is smaller if a node has responded under another name than the one in `nodes`.
    """
    answers = [
        row for row in all_events(attempt) if row["event"] == UNFIT or (row["event"] == PASSED and row["part"] == part)
    ]
    known = {row["node"] for row in answers}
    named = known | {row.get("address") for row in answers}
    silent = [node for node in nodes if node not in named and node.split(".")[0] not in known]
    return silent, min(len(nodes) - len(known), len(silent))


@click.command()
@click.option("--attempt", required=True, type=click.Path(path_type=Path), help="Folder of records.")
@click.option("--part", required=True, help="Task of the nodes: check or copy.")
@click.option("--within", required=True, help="Seconds that they had for it.")
def main(attempt: Path, part: str, within: str) -> None:
    """Record for each silent node that it cannot take part, and print a sentence."""
    silent, count = silent_nodes(attempt, part, sys.stdin.read().split())
    if count <= 0:
        return
    reason = f"no response to the {part} within {within} s"
    if count < len(silent):
        silent, reason = ["unknown"], f"{count} of {', '.join(silent)} gave {reason}"
    for node in silent:
        echo(f"Error: node {node} cannot take part: {reason}.", err=True)
        add_event(attempt, node, UNFIT, reason=reason)


if __name__ == "__main__":
    main()
