"""The parts of the report about one run: errors, training, configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from hydrazero.shards.text.foreign_text import for_html
from hydrazero.trainer.evaluation.tables import OTHER_HEADINGS, other_rows
from hydrazero.trainer.plots.parity import other_parity_plots, parity_plots
from hydrazero.trainer.records.run_log import left_out, shown
from hydrazero.trainer.records.run_record import lasting_changes
from hydrazero.trainer.records.task_errors import TaskEvaluation
from hydrazero.trainer.report.errors_by import calibration_plots, element_errors, force_errors, size_errors
from hydrazero.trainer.report.history import cosine_maps, cosines, learning_curves, over_steps, overview, throughput
from hydrazero.trainer.report.markup import facts, paragraph, picture, table
from hydrazero.trainer.report.run_data import RunData

TRIVIAL = (
    "Trivial: the errors of the trivial predictor on the same structures. It predicts the "
    "task's reference energies and zero forces. Ratio: its error divided by that of the model."
)


def heading(run: RunData) -> str:
    """Return the heading of a run: its name, model, progress and command."""
    model = run.record["model"]
    size = f"{model['encoder']}, {model['features']} features, {model['layers']} layers, cutoff {model['cutoff']} Å"
    line = f"{len(run.tasks)} tasks · {size} · {progress(run)} · started {run.record['started']}"
    return f"<h1>{for_html(run.label)}</h1>{facts(line)}{_command(run)}"


def _command(run: RunData) -> str:
    return f'<p class="facts"><code>{for_html(run.record["command"])}</code></p>'


def progress(run: RunData) -> str:
    """Return how many of its steps a run has trained."""
    resumes = run.record.get("resumes", [])
    steps = resumes[-1]["steps"] if resumes else run.record["train"]["steps"]
    ended = run.step >= steps
    return f"{run.step:,} of {steps:,} steps{'' if ended else ' (in progress, or stopped)'}"


def sections(run: RunData) -> list[str]:
    """Return all parts of the report of a run after its heading."""
    return [*evaluation(run), *_training(run), *_balance(run), *configuration(run)]


def evaluation(run: RunData) -> list[str]:
    """Return the errors on the evaluated split, as tables and pictures."""
    if run.evaluation is None:
        return [f"<h2>Errors</h2>{not_evaluated(run, 'This run')}"]
    tasks = run.evaluation.tasks
    parts = [f"<h2>Errors on the {for_html(run.evaluation.split)} split</h2>", _errors(tasks)]
    parts.append(paragraph(TRIVIAL))
    parts += _other_errors(tasks)
    parts += [paragraph(sentence) for sentence in left_out(tasks)]
    parts += ["<h2>Parity</h2>", picture(parity_plots(run.predictions), "predicted against true energies and forces")]
    others = other_parity_plots({name: data.others for name, data in run.predictions.items()})
    if others is not None:
        parts += ["<h3>Other quantities</h3>", picture(others, "predicted against true stress and targets")]
    parts += ["<h2>Errors by number of atoms</h2>", picture(size_errors([run]), "errors against the number of atoms")]
    parts.append(
        paragraph(
            "Lines are medians; bands contain 80% of the errors. Force errors are means over the atoms of a structure."
        )
    )
    if (by_element := element_errors(run)) is not None:
        parts += ["<h2>Force errors by element</h2>", picture(by_element, "force error by task and element")]
    if (by_force := force_errors([run])) is not None:
        parts += [
            "<h2>Force errors by length of the force</h2>",
            picture(by_force, "force error against the length of the force"),
        ]
        parts.append(paragraph("The error is the length of the error vector. On the dashed line it equals the force."))
    return [*parts, *_spread(run)]


def not_evaluated(run: RunData, name: str) -> str:
    """Return a paragraph that states why there are no errors of a run, and how to measure them."""
    reason = f"{name} has not been evaluated{' as it is now' if run.no_errors else ''}."
    hint = f"hydrazero evaluate {run.path}"
    why = f"{reason} {run.no_errors}".strip()
    return f"<p>{for_html(why)} To evaluate it, run <code>{for_html(hint)}</code>.</p>"


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
    """Return a table of stress and targets, if any task has them."""
    rows = other_rows(tasks)
    if not rows:
        return []
    return [
        "<h3>Other quantities</h3>",
        table(OTHER_HEADINGS, rows, texts=(0, 1, 2)),
        paragraph("Trivial: the errors of zero stress and of the mean of the training labels."),
    ]


def _spread(run: RunData) -> list[str]:
    """Return how well the spread of ensembles predicts their errors."""
    figure = calibration_plots(run)
    if figure is None or run.evaluation is None:
        return []
    sentences = []
    for name, task in run.evaluation.tasks.items():
        if spread := task.energy_spread:
            sentences.append(
                paragraph(
                    f"{name}: the root mean square of error divided by spread is {spread.error_over_spread:.2f} (1 if "
                    f"calibrated). {100 * spread.within_one:.0f}% of the errors are within one spread (68% for a "
                    f"normal distribution), {100 * spread.within_two:.0f}% within two (95%)."
                )
            )
    return [
        "<h2>Uncertainty: calibration of the ensemble's spread</h2>",
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
    if skipped := max(run.series("train", "skipped_structures")[1], default=0):
        parts.append(
            paragraph(
                f"{skipped:,.0f} training structures were skipped because their blocks of shards could not be read."
            )
        )
    parts += ["<h2>Learning curves</h2>", picture(learning_curves([run]), "errors of each task over steps")]
    parts.append(
        paragraph("Mean absolute errors on the training batches (thin lines) and on the validation split (points).")
    )
    return [
        *parts,
        "<h2>Throughput</h2>",
        picture(throughput([run]), "structures and atoms per second, waiting for data, memory"),
    ]


def _balance(run: RunData) -> list[str]:
    """Return weights, sampling and gradients of the tasks, and the cosines between their gradients."""
    rows = run.rows("train")
    if len(run.tasks) < 2 or not rows:
        return []
    parts = ["<h2>Balance of the tasks</h2>", _balance_table(run)]
    temperature = run.record.get("data", {}).get("temperature", 1.0)
    parts.append(
        paragraph(
            f"data.temperature = {temperature:g} sets how often the structures of a task are drawn. The weight of its "
            f"loss is set by its weight in the run file and by balance.method = "
            f"{run.record.get('balance', {}).get('method', 'uniform')}."
        )
    )
    figures = (
        ("train", "weights", "weight", "Loss weights"),
        ("train", "sampling_shares", "fraction", "Fractions of the structures drawn"),
        ("balance", "gradient_norms", "norm", "Gradient norms of the unweighted losses"),
    )
    for kind, key, label, title in figures:
        if key == "weights" and _constant(run):
            parts += [f"<h3>{title}</h3>", paragraph("The weights did not change during the run.")]
        elif (figure := over_steps([run], kind, key, label)) is not None:
            parts += [f"<h3>{title}</h3>", picture(figure, f"{title.lower()} over steps")]
    parts.append(paragraph("Each task has its own panel; grey lines are those of the other tasks."))
    parts.append("<h3>Cosines between the tasks' gradients</h3>")
    if matrices := cosines(run):
        parts.append(picture(cosine_maps(run.tasks, matrices), "cosines between the tasks' gradients"))
        parts.append(
            paragraph(
                "The gradients are those with respect to a linear layer between encoder and heads, summed over ranks. "
                "If a cosine is above 0, two tasks change the encoder in similar directions; if it is below 0, in "
                "opposite ones."
            )
        )
    else:
        parts.append(paragraph("No gradients were measured yet; balance.every sets how often they are."))
    return parts


def _constant(run: RunData) -> bool:
    return all(len(set(run.series("train", "weights", task)[1])) <= 1 for task in run.tasks)


def _balance_table(run: RunData) -> str:
    """Return a table of the last weight, mean sampling fraction and mean gradient norm of each task."""
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
    """Return the configuration, data and code of a run, and how settings were changed at resumes."""
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
        parts.append(
            facts(
                f"resumed from step {resume['step']:,} on {resume.get('started', 'an unknown date')}; {commit(resume)}"
            )
        )
    for step, changes in lasting_changes(record):
        parts.append(paragraph(f"Settings changed at step {step:,}: {', '.join(map(str, changes))}."))
    parts.append(f"<details><summary>run.json</summary><pre>{for_html(json.dumps(record, indent=1))}</pre></details>")
    return parts


def commit(record: dict[str, Any]) -> str:
    """Return a sentence that names the git commit from which a run was started."""
    if "git" not in record:
        return "git commit: not recorded"
    if record["git"] is None:
        return "git commit: none, because the run was not started in a git work tree"
    changed = " with uncommitted changes" if record["git"]["changed"] else ""
    return f"git commit: {record['git']['commit']}{changed}"
