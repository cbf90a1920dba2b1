"""The table of a search's best trials."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.table import Table

from hydrazero.shards.text.foreign_text import echo
from hydrazero.trainer.records.progress_line import wide_console
from hydrazero.trainer.search.campaign import command_of
from hydrazero.trainer.search.journal import Journal
from hydrazero.trainer.search.trial_rows import STATES, headings_of, ranked, shown_value, trial_rows

SHOWN = 10
"""Number of trials in the table."""


def print_best(journal: Journal) -> bool:
    """Print the best trials and the command that trains the best one fully; return whether there are any."""
    rows = trial_rows(journal)
    states = Counter(row.state for row in rows)
    echo(f"{journal.out}: " + (", ".join(f"{states[s]} {s}" for s in STATES.values() if states[s]) or "no trials"))
    best = ranked(rows)
    if not best:
        return False
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("trial", "error", "seconds", "training\nstructures/s", "inference\nstructures/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in headings_of(list(journal.space.vary)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in best[:SHOWN]:
        last = row.results[-1]
        numbers = [f"{row.error:.4f}", f"{last['seconds']:.0f}", f"{last['training']:.0f}", f"{last['inference']:.0f}"]
        table.add_row(str(row.number), *numbers, *(shown_value(row.values[key]) for key in journal.space.vary))
    wide_console(stderr=False).print(table)
    echo("error: validation MAE over the trivial one, as a geometric mean over tasks, energies and forces")
    echo(f"to train the best trial with all steps: {command_of(journal, best[0])}")
    return True
