"""Tables that commands print."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from hydrazero.trainer.console import shown


def print_evaluation(document: dict[str, Any]) -> None:
    """Print an evaluation: a row per task, with the trivial predictor (references only, zero forces) beside it."""
    table = Table(title=f"{document['split']} split", title_justify="left")
    table.add_column("task")
    table.add_column("structures", justify="right")
    table.add_column("fidelity")
    for heading in ("energy MAE\nmeV/atom", "trivial", "force MAE\nmeV/Å", "trivial"):
        table.add_column(heading, justify="right")
    for name, row in document["tasks"].items():
        table.add_row(
            name,
            str(row["structures"]),
            row["fidelity"],
            shown(row["energy_mae_mev_per_atom"], 2),
            shown(row["trivial_energy_mae_mev_per_atom"]),
            shown(row["force_mae_mev_per_angstrom"]),
            shown(row["trivial_force_mae_mev_per_angstrom"]),
        )
    Console().print(table)
