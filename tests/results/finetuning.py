"""Learning curves of tasks that a pretrained model has not seen: fine-tuned, from scratch, by the nearest head."""

from __future__ import annotations

import shutil
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from results.jobs import PAGES, ROOT, ResultRun, command, make
from results.sixteen_page import SHORT
from results.tables import ERRORS, UNITS, table

from hydrazero.shards.convert.subset import write_subset
from hydrazero.shards.files import read_json, toml_text, write_json
from hydrazero.shards.manifest import read_manifest
from hydrazero.trainer.plots.panels import COLOURS, GREY, pairs_of_tasks
from hydrazero.trainer.records.task_errors import KEYS

WAYS = {"nearest": "nearest head", "scratch": "from scratch", "finetuned": "fine-tuned"}
SEED = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One task learned from a given number of structures."""

    spec: dict[str, Any]
    """Contents of the TOML file of the table."""
    name: str
    """Name of the table."""
    task: str
    shards: Path
    """Shards of the complete task."""
    size: int
    """Number of training structures."""

    @property
    def folder(self) -> Path:
        """Folder of its runs."""
        return ROOT / self.name / f"{self.task}-{self.size}"

    @property
    def path(self) -> Path:
        """File with its errors."""
        return ROOT / self.name / f"{self.task}-{self.size}.result.json"

    def subset(self) -> Path:
        """Return the shards of its structures, which are made if they do not exist."""
        out = self.folder / "data"
        if not out.exists():
            there = read_manifest(self.shards).structures("val")
            val = min(max(round(self.spec["validation"] * self.size), 2), there)
            write_subset(self.shards, out, {"train": self.size, "val": val}, SEED)
        return out


def points_of(spec: dict[str, Any], name: str) -> list[Point]:
    """Return the points of all curves, small numbers of structures first, never more than a task has."""
    found: dict[Path, Point] = {}
    for size in spec["sizes"]:
        for data in (data for data in spec["data"] if data.get("held_out")):
            shards = Path(data["shards"])
            count = min(size, read_manifest(shards).structures("train"))
            point = Point(spec=spec, name=name, task=data["name"], shards=shards, size=count)
            found.setdefault(point.path, point)
    return list(found.values())


def run_finetunings(spec: dict[str, Any], name: str, data: Path) -> Path:
    """Pretrain, then compute every missing point and rewrite page and picture after each; return the page's path."""
    known = tuple(each for each in spec["data"] if not each.get("held_out"))
    pretraining = ResultRun(spec=spec, name=name, datasets=known, run=spec["pretraining"])
    make("plan", pretraining, data)
    make("result", pretraining, data)
    points = points_of(spec, name)
    for point in points:
        if not point.path.exists():
            write_json(point.path, errors_of(point, pretraining.folder / "run"))
            sys.stdout.write(f"{point.path}\n")
            sys.stdout.flush()
        write_page(spec, name, points)
    return write_page(spec, name, points)


def errors_of(point: Point, model: Path) -> dict[str, Any]:
    """Fine-tune and train from scratch; return the errors of all three ways and the seconds that two of them took."""
    tuned, scratch = point.folder / "finetuned", point.folder / "scratch"
    data, ranks = point.subset(), point.spec["ranks"]
    for out in (tuned, scratch):
        shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    command("finetune", model, data, "--out", tuned, "--ranks", ranks, *point.spec["options"])
    between = time.monotonic()
    planned = tomllib.loads((tuned / "run.toml").read_text(encoding="utf-8"))
    run_file = point.folder / "scratch.toml"
    comment = "finetuned/run.toml with random first weights."
    run_file.write_text(toml_text(from_scratch(planned, scratch, point.spec), [comment]), encoding="utf-8")
    command("train", run_file, "--ranks", ranks)
    command("evaluate", scratch)
    outcome = read_json(tuned / "finetune.json")
    return {
        "head": outcome["begun_as"][0],
        "nearest": outcome["before"],
        "finetuned": outcome["after"],
        "scratch": read_json(scratch / "evaluation.json")["tasks"][point.task],
        "seconds": {"finetuned": between - began, "scratch": time.monotonic() - between},
    }


def from_scratch(planned: dict[str, Any], out: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the run file of a fine-tuning without its starting model, with learning rate and steps to match."""
    tasks = [{key: value for key, value in task.items() if key != "init_head"} for task in planned["tasks"]]
    params = {**planned["deepspeed"]["optimizer"]["params"], "lr": spec["scratch_rate"]}
    kept = {key: value for key, value in planned.items() if key != "finetune"}
    factor = spec["scratch_steps"]
    train = {**planned["train"], "steps": round(factor * planned["train"]["steps"])}
    train["evaluate_every"] = max(round(factor * planned["train"]["evaluate_every"]), 1)
    return {
        **kept,
        "run": {"out": str(out), "seed": SEED},
        "tasks": tasks,
        "train": train,
        "deepspeed": {**planned["deepspeed"], "optimizer": {"params": params}},
    }


def write_page(spec: dict[str, Any], name: str, points: Sequence[Point]) -> Path:
    """Write NAME.md and NAME.png with the points that are finished; return the page's path."""
    results = {point: read_json(point.path) for point in points if point.path.exists()}
    lines = [f"# {spec['title']}", "", spec["text"].strip(), ""]
    if results:
        draw(results).savefig(PAGES / f"{name}.png", dpi=100)
        lines += [f"![Errors by the number of training structures]({name}.png)", "", spec["findings"].strip(), ""]
    for data in (data for data in spec["data"] if data.get("held_out")):
        of_task = {point: found for point, found in results.items() if point.task == data["name"]}
        lines += [f"## {data['name']}", "", f"{data['text']}.{zero_forces(of_task)}", "", *curve_table(of_task)]
    lines += [f"Made by `make results NAME={name} DATA=FOLDER`.", ""]
    path = PAGES / f"{name}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def zero_forces(results: dict[Point, dict[str, Any]]) -> str:
    """Return a sentence with the error of predicting zero forces, if there are results."""
    errors = [found["finetuned"][KEYS["trivial_force_mae"]] for found in results.values()]
    return f" Predicting zero forces gives an error of {errors[0]:.1f} meV/Å." if errors else ""


def curve_table(results: dict[Point, dict[str, Any]]) -> list[str]:
    """Return a table of a task's errors with a row for each number of structures."""
    if not results:
        return ["Nothing has been run yet.", ""]
    headings = ["structures", "starts from"]
    headings += [f"{SHORT[kind]}, {way}" for kind in ERRORS for way in WAYS.values()]
    headings += ["s, fine-tuned", "s, from scratch"]
    rows = []
    for point, found in sorted(results.items(), key=lambda item: item[0].size):
        errors = [found[way][key] for key in ERRORS.values() for way in WAYS]
        cells = ["" if error is None else f"{error:.2f}" if error < 10 else f"{error:.1f}" for error in errors]
        took = [f"{found['seconds'][way]:.0f}" for way in ("finetuned", "scratch")]
        rows.append([str(point.size), f"`{found['head']}`", *cells, *took])
    return table(headings, rows)


def draw(results: dict[Point, dict[str, Any]]) -> Figure:
    """Draw errors against the number of structures on logarithmic axes, forces above and energies below."""
    tasks = list(dict.fromkeys(point.task for point in results))
    figure, pairs = pairs_of_tasks(tasks, height=2.2)
    for task, axes in zip(tasks, pairs, strict=True):
        of_task = sorted(
            ((point.size, found) for point, found in results.items() if point.task == task), key=lambda item: item[0]
        )
        for ax, kind in zip(axes, ("forces", "energies"), strict=True):
            draw_curves(ax, kind, [size for size, _ in of_task], [found for _, found in of_task])
    handles, labels = pairs[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return figure


def draw_curves(ax: Axes, kind: str, sizes: Sequence[int], found: Sequence[dict[str, Any]]) -> None:
    """Draw a task's errors of one kind, with a curve for each way of training."""
    for (way, label), colour in zip(WAYS.items(), (GREY, COLOURS[1], COLOURS[0]), strict=True):
        errors = [each[way][ERRORS[kind]] for each in found]
        ax.plot(sizes, errors, marker="o", markersize=4, linewidth=1.5, color=colour, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    ax.set_ylabel(f"{kind}, {UNITS[kind]}")
    if kind == "energies":
        ax.set_xlabel("training structures")
