"""The report that compares several runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hydrazero.shards.text.foreign_text import for_html
from hydrazero.trainer.records.run_log import shown
from hydrazero.trainer.report.errors_by import force_errors, size_errors
from hydrazero.trainer.report.history import cosine_maps, cosines, learning_curves, over_steps, overview, throughput
from hydrazero.trainer.report.markup import facts, paragraph, picture, table
from hydrazero.trainer.report.one_run import commit, configuration, evaluation, heading, not_evaluated, progress
from hydrazero.trainer.report.run_data import RunData, tasks_of

Value = Callable[[RunData, str], float | None]

NOT_COMPARED = ("command", "started", "resumes", "git", "manifests")
"""Keys of run.json that are shown elsewhere or differ between any two runs."""


def comparison(runs: Sequence[RunData]) -> list[str]:
    """Return the parts of the page: the comparison of the runs, then each run by itself."""
    return [
        f"<h1>{len(runs)} runs side by side</h1>",
        *_facts(runs),
        *_errors(runs),
        *_differences(runs),
        *_training(runs),
        *(_alone(run) for run in runs),
    ]


def _facts(runs: Sequence[RunData]) -> list[str]:
    rows = []
    for run in runs:
        memory = run.series("train", "memory_mb")[1]
        rows.append(
            [
                run.label,
                progress(run),
                str(run.record.get("ranks", "-")),
                shown(_median(run, "structures_per_s")),
                shown(_median(run, "data_wait_share", 100.0)),
                f"{max(memory):,.0f}" if memory else "-",
            ]
        )
    headings = ["run", "steps", "ranks", "structures/s\n(median)", "waiting %\n(median)", "peak memory\nof a rank, MB"]
    return [table(headings, rows, texts=(0, 1)), *(facts(f"{run.label}: {commit(run.record)}") for run in runs)]


def _median(run: RunData, key: str, factor: float = 1.0) -> float | None:
    values = run.series("train", key)[1]
    return factor * float(np.median(values)) if values else None


def _errors(runs: Sequence[RunData]) -> list[str]:
    evaluated = [run for run in runs if run.evaluation is not None]
    parts = ["<h2>Errors</h2>"]
    for run in runs:
        if run.evaluation is None:
            parts.append(not_evaluated(run, run.label))
    if evaluated:
        splits = list(dict.fromkeys(run.evaluation.split for run in evaluated if run.evaluation))
        if len(splits) > 1:
            named = ", ".join(f"{run.label}: {run.evaluation.split}" for run in evaluated if run.evaluation)
            parts.append(paragraph(f"The runs were evaluated on different splits ({named}), so no error is marked."))
        else:
            parts.append(paragraph(f"Errors on the {splits[0]} split. The lowest error of each task is marked."))
        parts += _tables(evaluated, _evaluated, marked=len(splits) == 1)
        if len(evaluated) == len(runs):
            parts += _error_pictures(runs)
    validated = [run for run in runs if run.rows("evaluation")]
    if len(evaluated) < len(runs) and validated:
        parts.append(paragraph("Errors at the last validation of each run. The lowest error of each task is marked."))
        parts += _tables(validated, _validated, marked=True)
    return [*parts, *_other_data(runs)]


def _evaluated(error: str) -> Value:
    def value(run: RunData, task: str) -> float | None:
        if run.evaluation is None or task not in run.evaluation.tasks:
            return None
        found: float | None = getattr(run.evaluation.tasks[task], error)
        return found

    return value


def _validated(error: str) -> Value:
    def value(run: RunData, task: str) -> float | None:
        values = run.error_series("evaluation", task, error)[1]
        return values[-1] if values else None

    return value


def _tables(runs: Sequence[RunData], value_of: Callable[[str], Value], *, marked: bool) -> list[str]:
    """Return tables of energies, forces and stress, with a row for each task and a column for each run."""
    tables = []
    quantities = (
        ("energy_mae", "Energy MAE, meV/atom", 2),
        ("force_mae", "Force MAE, meV/Å", 1),
        ("stress_mae", "Stress MAE, meV/Å³", 3),
    )
    for error, title, digits in quantities:
        value = value_of(error)
        rows: list[list[str]] = []
        best: set[tuple[int, int]] = set()
        for task in tasks_of(runs):
            values = [value(run, task) for run in runs]
            if all(one is None for one in values):
                continue
            lowest = min(one for one in values if one is not None)
            if marked and any(one not in (None, lowest) for one in values):
                best |= {(len(rows), 1 + place) for place, one in enumerate(values) if one == lowest}
            rows.append([task, *(shown(one, digits) for one in values)])
        if rows:
            held = table(["task", *(run.label for run in runs)], rows, best=best)
            tables.append(f"<div><h3>{title}</h3>{held}</div>")
    return [f'<div class="side">{"".join(tables)}</div>']


def _error_pictures(runs: Sequence[RunData]) -> list[str]:
    parts = ["<h3>By number of atoms</h3>", picture(size_errors(runs), "errors against the number of atoms")]
    if (figure := force_errors(runs)) is not None:
        parts += [
            "<h3>Forces by length of the force</h3>",
            picture(figure, "force error against the length of the force"),
        ]
    return [*parts, paragraph("Lines are medians. On the dashed line, the error equals the force.")]


def _other_data(runs: Sequence[RunData]) -> list[str]:
    """Return a sentence that names the tasks whose shards differ between the runs, if there are any."""
    other = []
    for task in tasks_of(runs):
        found = {run.record["manifests"][task] for run in runs if task in run.record.get("manifests", {})}
        if len(found) > 1:
            other.append(task)
    if not other:
        return []
    return [paragraph(f"The runs have different shards, so different structures, for these tasks: {', '.join(other)}.")]


def _differences(runs: Sequence[RunData]) -> list[str]:
    """Return a table of the keys of the configuration whose values differ between the runs."""
    flat = [flattened(run.record) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    rows = []
    for key in keys:
        values = [each.get(key, "-") for each in flat]
        if len(set(values)) > 1 and key != "run.out":
            rows.append([key, *values])
    parts = ["<h2>Differences between the configurations</h2>"]
    if not rows:
        return [*parts, paragraph("There are none.")]
    return [*parts, table(["key", *(run.label for run in runs)], rows)]


def flattened(record: dict[str, Any]) -> dict[str, str]:
    """Return run.json as texts by dotted keys such as 'train.steps'; tasks have their names in the keys."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                walk(f"{prefix}.{key}" if prefix else key, one)
        else:
            flat[prefix] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    kept = {key: value for key, value in record.items() if key not in (*NOT_COMPARED, "tasks")}
    walk("", kept)
    for task in record["tasks"]:
        walk(f"tasks.{task['name']}", {key: value for key, value in task.items() if key != "name"})
    return flat


def _training(runs: Sequence[RunData]) -> list[str]:
    logged = [run for run in runs if run.rows("train")]
    if not logged:
        return ["<h2>Training</h2>", paragraph("No step of any run has been logged yet.")]
    parts = ["<h2>Losses</h2>", picture(overview(runs), "loss, learning rate, gradient norm over steps")]
    parts += ["<h2>Learning curves</h2>", picture(learning_curves(runs), "errors of each task over steps")]
    parts += [
        "<h2>Throughput</h2>",
        picture(throughput(runs), "structures and atoms per second, waiting for data, memory"),
    ]
    if len(tasks_of(runs)) > 1:
        parts.append("<h2>Balance of the tasks</h2>")
        for key, label, title in (
            ("weights", "weight", "Loss weights"),
            ("sampling_shares", "fraction", "Fractions of the structures drawn"),
        ):
            if (figure := over_steps(runs, "train", key, label)) is not None:
                parts += [f"<h3>{title}</h3>", picture(figure, f"{title.lower()} over steps")]
        parts += _cosines(runs)
    return parts


def _cosines(runs: Sequence[RunData]) -> list[str]:
    """Return pictures of the mean cosines of the runs, with runs of the same tasks in one picture."""
    by_tasks: dict[tuple[str, ...], list[tuple[str, Any]]] = {}
    for run in runs:
        if matrices := cosines(run):
            by_tasks.setdefault(tuple(run.tasks), []).append((run.label, matrices[-1][1]))
    if not by_tasks:
        return []
    pictures = [
        picture(cosine_maps(tasks, matrices), "mean cosines between the tasks' gradients")
        for tasks, matrices in by_tasks.items()
    ]
    return ["<h3>Cosines between the tasks' gradients, mean over the run</h3>", *pictures]


def _alone(run: RunData) -> str:
    """Return, folded, the parts of a run's own report that the comparison does not show."""
    parts = [heading(run), *evaluation(run), *configuration(run)]
    return f'<details class="run"><summary>{for_html(run.label)}</summary>{"".join(parts)}</details>'
