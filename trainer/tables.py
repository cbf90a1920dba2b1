"""Tables that commands print."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hydrazero.trainer.console import left_out, shown


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
    console = Console()
    console.print(table)
    for sentence in left_out(document["tasks"]):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
