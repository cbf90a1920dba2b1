"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import json
import os
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hydrazero.trainer.console import left_out, shown
from hydrazero.trainer.report_data import RunData, read_run
from hydrazero.trainer.report_plots import calibration_plots, element_errors, loss_curves, parity_plots, throughput
from hydrazero.trainer.run_files import REPORT_NAME
from hydrazero.trainer.tables import OTHER_HEADINGS, other_rows

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { margin: 0 auto; max-width: 1080px; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; }
p.facts { color: #666; margin: .1rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th { font-weight: 600; color: #555; font-size: .85rem; vertical-align: bottom; white-space: normal; }
td:first-child, th:first-child, td.text, th.text { text-align: left; }
img { max-width: 100%; height: auto; display: block; }
@media (max-width: 700px) { .wide img { width: 900px; max-width: none; } }
pre { font-size: .8rem; background: #f6f6f6; padding: .8rem; overflow-x: auto; } summary { cursor: pointer; }
"""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path; raises ConfigError if the run's files are missing or damaged."""
    run = read_run(run_dir)
    parts = [_heading(run, run_dir), *_evaluation_parts(run, run_dir), *_training_parts(run), _configuration(run)]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(run_dir.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    part = run_dir / (REPORT_NAME + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, run_dir / REPORT_NAME)
    return run_dir / REPORT_NAME


def parity_picture(run_dir: Path, out: Path) -> None:
    """Write the parity plots of a run's evaluation as one PNG."""
    parity_plots(read_run(run_dir)).savefig(out, dpi=130)


def _heading(run: RunData, run_dir: Path) -> str:
    model = run.record["model"]
    size = f"{model['encoder']}, {model['features']} features, {model['layers']} layers, cutoff {model['cutoff']} Å"
    steps = max((row["step"] for row in run.metrics), default=0)
    return (
        f"<h1>{escape(run_dir.name)}</h1>"
        f'<p class="facts">{len(run.tasks)} tasks · {escape(size)} · {steps:,} of {run.record["train"]["steps"]:,}'
        f" steps · started {escape(run.record['started'])}</p>"
        f'<p class="facts"><code>{escape(run.record["command"])}</code></p>'
    )


def _evaluation_parts(run: RunData, run_dir: Path) -> list[str]:
    if run.evaluation is None:
        hint = f"hydrazero evaluate {run_dir}"
        return [f"<h2>Errors</h2><p>This run has not been evaluated; do it with <code>{escape(hint)}</code>.</p>"]
    parts = [f"<h2>Errors on the {escape(run.evaluation['split'])} split</h2>", _table(run.evaluation["tasks"])]
    parts.append("<p>Trivial: the task's reference energies alone and zero forces, on the same structures.</p>")
    parts += _other_parts(run.evaluation["tasks"])
    parts += [f"<p>{escape(sentence)}</p>" for sentence in left_out(run.evaluation["tasks"])]
    parts += ["<h2>Parity</h2>", _picture(parity_plots(run), "predicted against true energies and forces", wide=True)]
    if (by_element := element_errors(run)) is not None:
        parts += ["<h2>Force error by element</h2>", _picture(by_element, "force error by task and element", wide=True)]
    parts += _spread_parts(run)
    return parts


def _other_parts(tasks: dict[str, Any]) -> list[str]:
    """Stress and targets, if any task has them."""
    rows = other_rows(tasks)
    if not rows:
        return []
    lines = [[f"<td{_side(place)}>{escape(cell)}</td>" for place, cell in enumerate(row)] for row in rows]
    headings = "".join(f"<th{_side(place)}>{heading}</th>" for place, heading in enumerate(OTHER_HEADINGS))
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    note = "<p>Trivial: zero stress, and the mean of the training labels.</p>"
    return [f'<h3>Other quantities</h3><div class="scroll"><table><tr>{headings}</tr>{body}</table></div>', note]


def _side(place: int) -> str:
    return ' class="text"' if place < 3 else ""


def _spread_parts(run: RunData) -> list[str]:
    """How well the spread of ensembles tells their errors."""
    figure = calibration_plots(run)
    if figure is None or run.evaluation is None:
        return []
    sentences = []
    for name, row in run.evaluation["tasks"].items():
        if found := row["energy_spread"]:
            sentences.append(
                f"<p>{escape(name)}: errors are {found['error_over_spread']:.2f} times the spread in the root mean "
                f"square; {100 * found['within_one']:.0f}% lie within one spread (68% if normal), "
                f"{100 * found['within_two']:.0f}% within two (95%).</p>"
            )
    return [
        "<h2>Uncertainty: calibration of the ensembles' spread</h2>",
        _picture(figure, "errors of energies against the spread of the ensemble", wide=True),
        *sentences,
    ]


def _table(tasks: dict[str, Any]) -> str:
    headings = (
        '<th>task</th><th class="text">fidelity</th><th>structures</th><th>energy MAE<br>meV/atom</th><th>trivial</th>'
        "<th>ratio</th><th>force MAE<br>meV/Å</th><th>trivial</th><th>ratio</th>"
    )
    rows = []
    for name, row in tasks.items():
        cells = [
            f"<td>{escape(name)}</td>",
            f'<td class="text">{escape(row["fidelity"])}</td>',
            f"<td>{row['structures']:,}</td>",
        ]
        for quantity, digits in (("energy_mae_mev_per_atom", 2), ("force_mae_mev_per_angstrom", 1)):
            ours, trivial = row[quantity], row[f"trivial_{quantity}"]
            ratio = trivial / ours if ours and trivial is not None else None
            cells += [f"<td>{shown(ours, digits)}</td><td>{shown(trivial)}</td><td>{shown(ratio)}</td>"]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{headings}</tr>{"".join(rows)}</table></div>'


def _training_parts(run: RunData) -> list[str]:
    if not run.rows("train"):
        return ["<h2>Training</h2><p>No step has been logged yet.</p>"]
    skipped = max(row.get("skipped_structures", 0) for row in run.rows("train"))
    note = f"<p>{skipped:,} training structures were skipped: blocks of shards that could not be read.</p>"
    return [
        *([note] if skipped else []),
        "<h2>Losses</h2>",
        _picture(loss_curves(run), "losses and validation errors over steps", wide=True),
        "<h2>Throughput</h2>",
        _picture(throughput(run), "structures, atoms per second and waiting share", wide=True),
    ]


def _configuration(run: RunData) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.record["versions"].items())
    return (
        f'<h2>Configuration</h2><p class="facts">{escape(versions)}</p>'
        f"<details><summary>run.json</summary><pre>{escape(json.dumps(run.record, indent=1))}</pre></details>"
    )


def _picture(figure: Figure, alternative: str, *, wide: bool = False) -> str:
    """Embed a figure; a wide one scrolls on a small screen instead of shrinking."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'
    return f'<div class="scroll wide">{image}</div>' if wide else image
