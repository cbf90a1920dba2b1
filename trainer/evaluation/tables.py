"""Tables of an evaluation, which commands print."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from hydrazero.trainer.records.progress_line import wide_console
from hydrazero.trainer.records.run_log import left_out, shown
from hydrazero.trainer.records.task_errors import Evaluation, TaskEvaluation

OTHER_HEADINGS = ("task", "quantity", "unit", "MAE", "trivial")
"""Headings of the table of stress and targets."""


def other_rows(tasks: Mapping[str, TaskEvaluation]) -> list[tuple[str, str, str, str, str]]:
    """Return a row of texts for the stress and for every target of each task, in the columns OTHER_HEADINGS."""
    rows = []
    for name, task in tasks.items():
        if task.stress_mae is not None:
            rows.append((name, "stress", "meV/Å³", shown(task.stress_mae, 3), shown(task.trivial_stress_mae, 3)))
        for target, errors in task.targets.items():
            rows.append((name, target, errors.unit, shown(errors.mae, 4), shown(errors.trivial_mae, 4)))
    return rows


def print_evaluation(evaluation: Evaluation) -> None:
    """Print a row of errors per task, with those of the trivial predictor (reference energies alone, zero forces)."""
    of_step = "" if evaluation.step is None else f", checkpoint of step {evaluation.step}"
    title = f"{evaluation.split} split{of_step}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("fidelity", no_wrap=True)
    for heading in ("struc-\ntures", "E MAE\nmeV/atom", "trivial", "F MAE\nmeV/Å", "trivial"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, task in evaluation.tasks.items():
        table.add_row(
            name,
            task.fidelity,
            str(task.structures),
            shown(task.energy_mae, 2),
            shown(task.trivial_energy_mae),
            shown(task.force_mae),
            shown(task.trivial_force_mae),
        )
    console = wide_console(stderr=False)
    console.print(table)
    if rows := other_rows(evaluation.tasks):
        other = Table(title="other quantities", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in OTHER_HEADINGS:
            left = heading in ("task", "quantity", "unit")
            other.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for row in rows:
            other.add_row(*row)
        console.print(other)
    for sentence in left_out(evaluation.tasks):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
