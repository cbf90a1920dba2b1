"""Tables that commands print."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from hydrazero.trainer.records.progress_line import wide_console
from hydrazero.trainer.records.run_log import left_out, shown

OTHER_HEADINGS = ("task", "quantity", "unit", "MAE", "trivial")


def other_rows(tasks: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return a row of texts for the stress and for every target of each task, in the columns OTHER_HEADINGS."""
    rows = []
    for name, row in tasks.items():
        stress, trivial = row["stress_mae_mev_per_angstrom3"], row["trivial_stress_mae_mev_per_angstrom3"]
        if stress is not None:
            rows.append((name, "stress", "meV/Å³", shown(stress, 3), shown(trivial, 3)))
        for target, errors in row["targets"].items():
            rows.append((name, target, errors["unit"], shown(errors["mae"], 4), shown(errors["trivial_mae"], 4)))
    return rows


def print_evaluation(document: dict[str, Any]) -> None:
    """Print an evaluation: a row per task, with the trivial predictor (references only, zero forces) beside it."""
    table = Table(title=f"{document['split']} split", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("fidelity", no_wrap=True)
    for heading in ("struc-\ntures", "E MAE\nmeV/atom", "trivial", "F MAE\nmeV/Å", "trivial"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in document["tasks"].items():
        table.add_row(
            name,
            row["fidelity"],
            str(row["structures"]),
            shown(row["energy_mae_mev_per_atom"], 2),
            shown(row["trivial_energy_mae_mev_per_atom"]),
            shown(row["force_mae_mev_per_angstrom"]),
            shown(row["trivial_force_mae_mev_per_angstrom"]),
        )
    console = wide_console(stderr=False)
    console.print(table)
    if rows := other_rows(document["tasks"]):
        other = Table(title="other quantities", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in OTHER_HEADINGS:
            left = heading in ("task", "quantity", "unit")
            other.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for row in rows:
            other.add_row(*row)
        console.print(other)
    for sentence in left_out(document["tasks"]):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
