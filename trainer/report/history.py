"""Figures of losses, errors, rates, weights and gradients over the steps of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from hydrazero.shards.text.foreign_text import for_plot
from hydrazero.trainer.plots.panels import (
    GREY,
    PAGE,
    colour_of,
    columns_for,
    legend_below,
    log_scale,
    nothing,
    pairs_of_tasks,
    plain_axes,
    small_multiples,
)
from hydrazero.trainer.report.run_data import RunData, tasks_of

TRAINED: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.45}
VALIDATED: dict[str, Any] = {"linewidth": 1.4, "marker": "o", "markersize": 3}

OVERVIEW = (
    ("loss", "loss", 1.0),
    ("learning_rate", "learning rate", 1.0),
    ("gradient_norm", "gradient norm", 1.0),
)
SKIPPED = ("skipped_steps", "skipped steps", 1.0)
THROUGHPUT = (
    ("structures_per_s", "structures/s", 1.0),
    ("atoms_per_s", "atoms/s", 1.0),
    ("data_wait_share", "waiting for data, %", 100.0),
    ("memory_mb", "peak memory of a rank, MB", 1.0),
)


def overview(runs: Sequence[RunData]) -> Figure:
    """Draw the loss (training and validation), learning rate, gradient norm, and skipped steps if there are any."""
    skipped = any(value for run in runs for value in run.series("train", "skipped_steps")[1])
    figure = _panels(runs, [*OVERVIEW, *([SKIPPED] if skipped else [])])
    loss, _, norm, *_ = figure.axes
    for number, run in enumerate(runs):
        loss.plot(*run.series("evaluation", "loss"), color=colour_of(number), **VALIDATED)
    for ax in (loss, norm):
        log_scale(ax)
    _legend(figure, runs)
    return figure


def throughput(runs: Sequence[RunData]) -> Figure:
    """Draw structures and atoms per second, the fraction of time spent waiting for data, and memory."""
    figure = _panels(runs, THROUGHPUT)
    for ax in figure.axes:
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    _name_runs(figure, runs)
    return figure


def _panels(runs: Sequence[RunData], panels: Sequence[tuple[str, str, float]]) -> Figure:
    """Draw quantities of the rows about training, given as (key, label, factor)."""
    figure, axes = small_multiples(len(panels), height=2.2)
    for ax, (key, label, factor) in zip(axes, panels, strict=True):
        for number, run in enumerate(runs):
            steps, values = run.series("train", key)
            ax.plot(steps, [factor * value for value in values], color=colour_of(number), **TRAINED)
        ax.set(xlabel="step", title=label)
        ax.title.set_fontsize(10)
        ax.locator_params(axis="x", nbins=5)
    return figure


def _lines_of_runs(runs: Sequence[RunData]) -> list[tuple[Line2D, str]]:
    return [(Line2D([], [], color=colour_of(n), linewidth=1.4), run.label) for n, run in enumerate(runs)]


def _name_runs(figure: Figure, runs: Sequence[RunData]) -> None:
    if len(runs) > 1:
        legend_below(figure, _lines_of_runs(runs))


def _legend(figure: Figure, runs: Sequence[RunData]) -> None:
    colour = colour_of(0) if len(runs) == 1 else GREY
    kinds = [
        (Line2D([], [], color=colour, **TRAINED), "training"),
        (Line2D([], [], color=colour, **VALIDATED), "validation"),
    ]
    legend_below(figure, [*(_lines_of_runs(runs) if len(runs) > 1 else []), *kinds])


def learning_curves(runs: Sequence[RunData]) -> Figure:
    """Draw errors of energies and forces over the steps, in training and validation, two axes for each task."""
    tasks = tasks_of(runs)
    figure, pairs = pairs_of_tasks(tasks, height=1.8)
    panels = (("energy_mae", "energy, meV/atom"), ("force_mae", "force, meV/Å"))
    for task, pair in zip(tasks, pairs, strict=True):
        for ax, (error, label) in zip(pair, panels, strict=True):
            _learning_curve(ax, runs, task, error)
            if not any(len(line.get_xdata()) for line in ax.get_lines()):  # type: ignore[arg-type]
                nothing(ax, f"no {label.split(',')[0]} labels")
                continue
            ax.set(ylabel=label, xlabel="step")
            ax.locator_params(axis="x", nbins=5)
            log_scale(ax)
    _legend(figure, runs)
    return figure


def _learning_curve(ax: Axes, runs: Sequence[RunData], task: str, error: str) -> None:
    for number, run in enumerate(runs):
        ax.plot(*run.error_series("train", task, error), color=colour_of(number), **TRAINED)
        ax.plot(*run.error_series("evaluation", task, error), color=colour_of(number), **VALIDATED)


def over_steps(runs: Sequence[RunData], kind: str, key: str, label: str) -> Figure | None:
    """Draw each task's value under a key of the rows of a kind, such as 'weights' of 'train', in axes of its own.

    With one run, the lines of the other tasks are shown in grey. Return None if there are no such values.
    """
    tasks = tasks_of(runs)
    if not any(run.series(kind, key, task)[0] for run in runs for task in tasks):
        return None
    figure, axes = small_multiples(len(tasks), height=1.7)
    for place, (ax, task) in enumerate(zip(axes, tasks, strict=True)):
        if place:
            ax.sharey(axes[0])
        if len(runs) == 1:
            for other in tasks:
                ax.plot(*runs[0].series(kind, key, other), color="#cccccc", linewidth=0.7, zorder=1)
        for number, run in enumerate(runs):
            ax.plot(*run.series(kind, key, task), color=colour_of(number), linewidth=1.4, zorder=2)
        ax.set_title(for_plot(task), fontweight="bold", fontsize=10)
        ax.set_xlabel("step")
        ax.locator_params(axis="x", nbins=5)
        if place % columns_for(len(tasks)) == 0:
            ax.set_ylabel(label)
    if key != "sampling_shares":
        for ax in axes:
            log_scale(ax)
    _name_runs(figure, runs)
    return figure


def cosines(run: RunData) -> list[tuple[str, NDArray[np.float64]]]:
    """Return titles and matrices [tasks, tasks] of cosines between the tasks' gradients: the last one, and the mean.

    An entry is NaN if a task had no structures in a measured step. The list is empty if nothing was measured.
    """
    rows = run.rows("balance")
    if not rows:
        return []
    measured = np.array([run.matrix(row, "cosines") for row in rows])
    known = np.isfinite(measured)
    total = np.where(known, measured, 0.0).sum(axis=0)
    mean = np.divide(total, known.sum(axis=0), out=np.full(total.shape, np.nan), where=known.any(axis=0))
    return [(f"step {rows[-1]['step']:,}", measured[-1]), (f"mean of {len(rows):,} measurements", mean)]


def cosine_maps(tasks: Sequence[str], matrices: Sequence[tuple[str, NDArray[np.float64]]]) -> Figure:
    """Draw cosines between tasks as annotated heat maps, side by side if the tasks are few, else below each other."""
    labels = 0.085 * max(len(task) for task in tasks)  # inches for the longest name
    side = max(0.5 * len(tasks), 1.4)
    columns = min(len(matrices), max(int((PAGE - labels) // (side + 0.3)), 1))
    rows = -(-len(matrices) // columns)
    size = (max(columns * (side + 0.3) + labels, 3.0), rows * (side + 0.9 * labels + 0.5))
    figure = Figure(figsize=size, layout="compressed")
    for number, (title, values) in enumerate(matrices):
        ax = plain_axes(figure.add_subplot(rows, columns, number + 1))
        ax.grid(visible=False)
        ax.imshow(np.ma.masked_invalid(values), vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(tasks)), list(map(for_plot, tasks)), rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(tasks)), list(map(for_plot, tasks)) if number % columns == 0 else [""] * len(tasks))
        ax.tick_params(length=0)
        for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
            value = values[row, column]
            ink = "white" if abs(value) > 0.6 else "black"
            text = f"{value:.2f}".replace("-0.00", "0.00")
            ax.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
    return figure
