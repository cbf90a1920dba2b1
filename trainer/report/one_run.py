"""The report of one run: errors, training, configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from hydrazero.trainer.evaluation.tables import OTHER_HEADINGS, other_rows
from hydrazero.trainer.plots.parity import other_parity_plots, parity_plots
from hydrazero.trainer.records.run_log import left_out, shown
from hydrazero.trainer.records.task_errors import TaskEvaluation
from hydrazero.trainer.report.errors_by import calibration_plots, element_errors, force_errors, size_errors
from hydrazero.trainer.report.history import cosine_maps, cosines, learning_curves, over_steps, overview, throughput
from hydrazero.trainer.report.markup import facts, paragraph, picture, table
from hydrazero.trainer.report.run_data import RunData


def heading(run: RunData) -> str:
    """Name, size, state and command of a run."""
    model = run.record["model"]
    size = f"{model['encoder']}, {model['features']} features, {model['layers']} layers, cutoff {model['cutoff']} Å"
    line = f"{len(run.tasks)} tasks · {size} · {progress(run)} · started {run.record['started']}"
    return f"<h1>{escape(run.label)}</h1>{facts(line)}{_command(run)}"


def _command(run: RunData) -> str:
    return f'<p class="facts"><code>{escape(run.record["command"])}</code></p>'


def progress(run: RunData) -> str:
    """How far a run has come."""
    resumes = run.record.get("resumes", [])
    steps = resumes[-1]["steps"] if resumes else run.record["train"]["steps"]
    ended = run.step >= steps
    return f"{run.step:,} of {steps:,} steps{'' if ended else ' (in progress, or stopped)'}"


def sections(run: RunData) -> list[str]:
    """Everything on a run but its name."""
    return [*evaluation(run), *_training(run), *_balance(run), *configuration(run)]


def evaluation(run: RunData) -> list[str]:
    """Errors of the evaluated split, in tables and pictures."""
    if run.evaluation is None:
        hint = f"hydrazero evaluate {run.path}"
        return [f"<h2>Errors</h2><p>This run has not been evaluated; do it with <code>{escape(hint)}</code>.</p>"]
    tasks = run.evaluation.tasks
    parts = [f"<h2>Errors on the {escape(run.evaluation.split)} split</h2>", _errors(tasks)]
    parts.append(paragraph("Trivial: the task's reference energies alone and zero forces, on the same structures."))
    parts += _other_errors(tasks)
    parts += [paragraph(sentence) for sentence in left_out(tasks)]
    parts += ["<h2>Parity</h2>", picture(parity_plots(run.predictions), "predicted against true energies and forces")]
    others = other_parity_plots({name: data.others for name, data in run.predictions.items()})
    if others is not None:
        parts += ["<h3>Other quantities</h3>", picture(others, "predicted against true stress and targets")]
    parts += ["<h2>Errors by size</h2>", picture(size_errors([run]), "errors against the number of atoms")]
    parts.append(paragraph("Medians, and where 80% of the errors lie; of forces, the mean over a structure's atoms."))
    if (by_element := element_errors(run)) is not None:
        parts += ["<h2>Force error by element</h2>", picture(by_element, "force error by task and element")]
    if (by_force := force_errors([run])) is not None:
        parts += ["<h2>Force error by force</h2>", picture(by_force, "force error against the length of the force")]
        parts.append(
            paragraph("Length of the error of an atom's force; on the dashed line it is as long as the force.")
        )
    return [*parts, *_spread(run)]


def _errors(tasks: Mapping[str, TaskEvaluation]) -> str:
    headings = ["task", "fidelity", "structures"]
    headings += ["energy MAE\nmeV/atom", "trivial", "ratio", "force MAE\nmeV/Å", "trivial", "ratio"]
    rows = []
    for name, task in tasks.items():
        cells = [name, task.fidelity or "-", f"{task.structures:,}"]
        energies, forces = (task.energy_mae, task.trivial_energy_mae, 2), (task.force_mae, task.trivial_force_mae, 1)
        for ours, trivial, digits in (energies, forces):
            ratio = trivial / ours if ours and trivial is not None else None
            cells += [shown(ours, digits), shown(trivial), shown(ratio)]
        rows.append(cells)
    return table(headings, rows, texts=(0, 1))


def _other_errors(tasks: Mapping[str, TaskEvaluation]) -> list[str]:
    """Stress and targets, if any task has them."""
    rows = other_rows(tasks)
    if not rows:
        return []
    return [
        "<h3>Other quantities</h3>",
        table(OTHER_HEADINGS, rows, texts=(0, 1, 2)),
        paragraph("Trivial: zero stress, and the mean of the training labels."),
    ]


def _spread(run: RunData) -> list[str]:
    """How well the spread of ensembles tells their errors."""
    figure = calibration_plots(run)
    if figure is None or run.evaluation is None:
        return []
    sentences = []
    for name, task in run.evaluation.tasks.items():
        if spread := task.energy_spread:
            sentences.append(
                paragraph(
                    f"{name}: errors are {spread.error_over_spread:.2f} times the spread in the root mean square; "
                    f"{100 * spread.within_one:.0f}% lie within one spread (68% if normal), "
                    f"{100 * spread.within_two:.0f}% within two (95%)."
                )
            )
    return [
        "<h2>Uncertainty: calibration of the ensembles' spread</h2>",
        picture(figure, "errors of energies against the spread of the ensemble"),
        *sentences,
    ]


def _training(run: RunData) -> list[str]:
    rows = run.rows("train")
    if not rows:
        return ["<h2>Training</h2>", paragraph("No step has been logged yet.")]
    parts = ["<h2>Losses</h2>", picture(overview([run]), "loss, learning rate, gradient norm over steps")]
    if not run.rows("evaluation"):
        parts.append(paragraph("No evaluation on the validation split has been logged yet."))
    if skipped := max(row.get("skipped_structures", 0) for row in rows):
        parts.append(
            paragraph(f"{skipped:,} training structures were skipped: blocks of shards that could not be read.")
        )
    parts += ["<h2>Learning curves</h2>", picture(learning_curves([run]), "errors of each task over steps")]
    parts.append(
        paragraph("Mean absolute errors: of the training batches (thin), and of the whole validation split (points).")
    )
    return [*parts, "<h2>Throughput</h2>", picture(throughput([run]), "structures, atoms per second, waiting, memory")]


def _balance(run: RunData) -> list[str]:
    """Weights and shares of the tasks, their gradients, and how these agree."""
    rows = run.rows("train")
    if len(run.tasks) < 2 or not rows:
        return []
    parts = ["<h2>Tasks against each other</h2>", _balance_table(run)]
    temperature = run.record.get("data", {}).get("temperature", 1.0)
    parts.append(
        paragraph(
            f"How often a task's structures are drawn is set by data.temperature = {temperature:g}; how much its loss "
            f"counts, by its weight and balance.method = {run.record.get('balance', {}).get('method', 'uniform')}."
        )
    )
    figures = (
        ("train", "weights", "weight", "Loss weights"),
        ("train", "sampling_shares", "share", "Shares of the structures drawn"),
        ("balance", "gradient_norms", "norm", "Gradient norms, of the losses without their weights"),
    )
    for kind, key, label, title in figures:
        if key == "weights" and _constant(run):
            parts += [f"<h3>{title}</h3>", paragraph("The weights were the same throughout.")]
        elif (figure := over_steps([run], kind, key, label)) is not None:
            parts += [f"<h3>{title}</h3>", picture(figure, f"{title.lower()} over steps")]
    parts.append(paragraph("Each task has a panel, in which the lines of the others are grey."))
    parts.append("<h3>Cosines between the tasks' gradients</h3>")
    if matrices := cosines(run):
        parts.append(picture(cosine_maps(run.tasks, matrices), "cosines between the tasks' gradients"))
        parts.append(
            paragraph(
                "Of the gradients with respect to a linear layer between encoder and heads, summed over ranks: above 0 "
                "two tasks pull the encoder the same way, below 0 against each other."
            )
        )
    else:
        parts.append(paragraph("No gradients were measured yet (balance.every)."))
    return parts


def _constant(run: RunData) -> bool:
    return all(len(set(run.series("train", "weights", task)[1])) <= 1 for task in run.tasks)


def _balance_table(run: RunData) -> str:
    """Last weight, mean share and mean gradient norm of each task."""
    rows = []
    for task in run.tasks:
        weights = run.series("train", "weights", task)[1]
        shares = run.series("train", "sampling_shares", task)[1]
        norms = run.series("balance", "gradient_norms", task)[1]
        rows.append(
            [
                task,
                f"{weights[-1]:.3g}" if weights else "-",
                f"{100 * float(np.mean(shares)):.1f}" if shares else "-",
                f"{float(np.mean(norms)):.3g}" if norms else "-",
            ]
        )
    return table(["task", "loss weight\n(last)", "structures drawn\n% (mean)", "gradient norm\n(mean)"], rows)


def configuration(run: RunData) -> list[str]:
    """With what a run was started, of which data and code."""
    record = run.record
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = ["<h2>Configuration</h2>", facts(versions), facts(commit(record))]
    hashes = record.get("manifests", {})
    rows = [
        [task["name"], str(task.get("shards", "-")), hashes.get(task["name"], "not recorded")]
        for task in record["tasks"]
    ]
    parts.append(table(["task", "shards", "SHA-256 of the manifest"], rows, texts=(0, 1, 2)))
    for resume in record.get("resumes", []):
        parts.append(facts(f"resumed from step {resume['step']:,} on {resume['started']}; {commit(resume)}"))
    parts.append(f"<details><summary>run.json</summary><pre>{escape(json.dumps(record, indent=1))}</pre></details>")
    return parts


def commit(record: dict[str, Any]) -> str:
    """Say of which git commit a run was started."""
    if "git" not in record:
        return "git commit: not recorded"
    if record["git"] is None:
        return "git commit: none, the run was not started in a git work tree"
    changed = " with changes that are not committed" if record["git"]["changed"] else ""
    return f"git commit: {record['git']['commit']}{changed}"
