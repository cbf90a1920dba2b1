"""Tables of the results of finished runs: a row per run, or each task's errors relative to the best run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results.jobs import PAGES, ResultRun

from hydrazero.shards.files import read_json
from hydrazero.trainer.records.task_errors import KEYS

ERRORS = {"energies": KEYS["energy_mae"], "forces": KEYS["force_mae"]}
"""Kinds of errors, and their names in results."""
UNITS = {"energies": "meV/atom", "forces": "meV/Å"}


def write_table(spec: dict[str, Any], name: str, jobs: Sequence[ResultRun]) -> Path:
    """Write NAME.md with the results that exist so far; return its path."""
    together = any(job.run.get("together") for job in jobs)
    return write_page(spec, name, methods_side_by_side(spec, jobs) if together else runs_by_dataset(spec, jobs))


def write_page(spec: dict[str, Any], name: str, tables: Sequence[str]) -> Path:
    """Write NAME.md with the title, text and tables of a page; return its path."""
    lines = [f"# {spec['title']}", "", spec["text"], "", *tables]
    lines += [f"Made by `make results NAME={name} DATA=FOLDER`.", ""]
    path = PAGES / f"{name}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, followed by an empty line."""
    return [f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows]] + [""]


def runs_by_dataset(spec: dict[str, Any], jobs: Sequence[ResultRun]) -> list[str]:
    """Return a table for each dataset with a row for each run."""
    headings = ["run", "energy MAE, meV/atom", "force MAE, meV/Å", "structures/s", "steps", "seconds"]
    headings += ["MB per rank"] if spec.get("memory") else []
    lines = []
    for data in spec["data"]:
        rows = [run_line(job, headings, str(data["name"])) for job in jobs if job.datasets[0]["name"] == data["name"]]
        lines += [f"## {data['name']}", "", f"{data['text']}.", "", *table(headings, rows)]
    return lines


def run_line(job: ResultRun, headings: Sequence[str], dataset: str) -> list[str]:
    """Return the row of a run: its errors and costs."""
    name = f"`{job.run['name']}`"
    if not job.path("result").exists():
        return [name, "not run yet", *[""] * (len(headings) - 2)]
    found = read_json(job.path("result"))
    errors = found["tasks"][dataset]
    line = [name, f"{errors[ERRORS['energies']]:.2f}", f"{errors[ERRORS['forces']]:.1f}"]
    line += [f"{found['structures_per_s']:.0f}", f"{found['steps']:,}", f"{found['seconds']:.0f}"]
    return line + ([f"{found['memory_mb']:,.0f}"] if job.spec.get("memory") else [])


def methods_side_by_side(spec: dict[str, Any], jobs: Sequence[ResultRun]) -> list[str]:
    """Return tables of each task's error by method, divided by the lowest of any joint run, and a summary.

    Runs of the same `method` with different seeds share one column, which holds their geometric mean.
    """
    names = [str(data["name"]) for data in spec["data"]]
    joint: dict[str, list[dict[str, Any]]] = {}
    alone: dict[str, Any] = {}
    for job in jobs:
        if not job.path("result").exists():
            continue
        if job.run.get("together"):
            joint.setdefault(str(job.run["method"]), []).append(read_json(job.path("result"))["tasks"])
        else:
            alone |= read_json(job.path("result"))["tasks"]
    if not joint:
        return ["Nothing has been run yet.", ""]
    lines, overall = [], {method: dict[str, list[float]]() for method in [*joint, "alone"]}
    for kind, key in ERRORS.items():
        rows = []
        for name in names:
            of_runs = {m: [run[name][key] for run in runs if run[name].get(key)] for m, runs in joint.items()}
            if not any(of_runs.values()):
                continue
            best = min(value for values in of_runs.values() for value in values)
            ratios = {m: geometric_mean([v / best for v in values]) for m, values in of_runs.items() if values}
            if alone.get(name, {}).get(key):
                ratios["alone"] = alone[name][key] / best
            for method, ratio in ratios.items():
                overall[method].setdefault(kind, []).append(ratio)
            cells = [f"{ratios[m]:.2f}" if m in ratios else "" for m in overall]
            rows.append([f"`{name}`", f"{best:.3g}", *cells])
        lines += [f"## {kind.capitalize()}", "", *table(["task", f"best, {UNITS[kind]}", *overall], rows)]
    return [*summary(joint, overall), *lines]


def summary(joint: dict[str, list[dict[str, Any]]], overall: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return a table of the worst task and the geometric mean over tasks, for energies, forces, and both."""
    headings = ["method", "runs", *(f"{kind}: {what}" for kind in ERRORS for what in ("worst", "mean"))]
    rows = []
    for method, kinds in overall.items():
        if not kinds:
            continue
        values = [kinds.get(kind, [math.nan]) for kind in ERRORS]
        cells = [f"{number:.2f}" for ratios in values for number in (max(ratios), geometric_mean(ratios))]
        both = [ratio for ratios in values for ratio in ratios]
        rows.append([f"`{method}`", str(len(joint.get(method, [0]))), *cells, f"{geometric_mean(both):.3f}"])
    return ["## All tasks", "", *table([*headings, "mean of all"], rows)]


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))
