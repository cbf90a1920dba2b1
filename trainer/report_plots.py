"""Pictures of the report, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hydrazero.trainer.report_data import RunData

COLOURS = ("#3366aa", "#cc6633", "#338855", "#aa3377", "#776644", "#447799", "#998822", "#884444")
DENSITY_POINTS = 3000
"""From so many points on, a parity plot shows their density."""


def _grid(count: int, *, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in rows of `columns`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.5)
    return figure, axes


def loss_curves(run: RunData) -> Figure:
    """Training losses of energy and forces, and validation errors, by task over steps."""
    figure, axes = _grid(4, columns=2, size=(5.2, 3.2))
    panels = (
        ("train", "energy_loss", "energy loss (training)", "loss, units of the task's scale"),
        ("train", "forces_loss", "force loss (training)", "loss, units of the task's scale"),
        ("evaluation", "energy_mae_mev_per_atom", "energy error (validation)", "MAE, meV/atom"),
        ("evaluation", "force_mae_mev_per_angstrom", "force error (validation)", "MAE, meV/Å"),
    )
    for ax, (kind, key, title, label) in zip(axes, panels, strict=True):
        for number, task in enumerate(run.tasks):
            steps, values = run.series(kind, task, key)
            colour = COLOURS[number % len(COLOURS)]
            ax.plot(steps, values, color=colour, label=task, marker="o" if kind == "evaluation" else None, markersize=3)
        ax.set(title=title, ylabel=label, xlabel="step")
        if any(np.size(line.get_xdata()) for line in ax.get_lines()):
            ax.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    return figure


def parity_plots(run: RunData, tasks: Sequence[str] | None = None) -> Figure:
    """Predicted against true energies (above references, per atom) and forces: two rows, a column per task."""
    names = list(run.predictions) if tasks is None else list(tasks)
    figure = Figure(figsize=(3.1 * len(names), 6.4), layout="constrained")
    for column, name in enumerate(names):
        data = run.predictions[name]
        energies = figure.add_subplot(2, len(names), column + 1)
        energies.set_title(name, fontweight="bold")
        if np.isfinite(data.energy).any():
            _parity(energies, data.energy, data.energy_predicted, "energy, eV/atom", "meV/atom")
        else:
            _nothing(energies, "no energies")
        forces = figure.add_subplot(2, len(names), len(names) + column + 1)
        if len(data.forces):
            _parity(forces, data.forces, data.forces_predicted, "force, eV/Å", "meV/Å")
        else:
            _nothing(forces, "no forces")
    return figure


def _nothing(ax: Axes, text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)


def _parity(ax: Axes, true: NDArray[np.float64], predicted: NDArray[np.float64], what: str, unit: str) -> None:
    known = np.isfinite(true)
    true, predicted = true[known], predicted[known]
    low, high = float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))
    pad = 0.05 * (high - low) or 1.0
    limits = (low - pad, high + pad)
    ax.plot(limits, limits, color="#888888", linewidth=0.8, zorder=1)
    if len(true) > DENSITY_POINTS:
        ax.hexbin(
            true, predicted, gridsize=70, extent=(*limits, *limits), norm=LogNorm(), mincnt=1, cmap="viridis", zorder=2
        )
    else:
        ax.scatter(true, predicted, s=9, color=COLOURS[0], alpha=0.6, linewidths=0, zorder=2)
    ax.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"true {what}", ylabel=f"predicted {what}")
    ax.locator_params(nbins=5)
    ax.spines[["top", "right"]].set_visible(False)
    mae = 1000 * float(np.abs(predicted - true).mean())
    ax.text(0.04, 0.96, f"MAE {mae:.3g} {unit}\nn = {len(true):,}", va="top", fontsize=9, transform=ax.transAxes)


def element_errors(run: RunData) -> Figure | None:
    """Heat map of force errors by task and element; None where no task has forces."""
    tasks = [name for name, data in run.predictions.items() if data.force_error_by_element]
    if not tasks:
        return None
    from ase.data import atomic_numbers

    elements = sorted(
        {e for name in tasks for e in run.predictions[name].force_error_by_element},
        key=lambda symbol: atomic_numbers[symbol],
    )
    values = np.full((len(tasks), len(elements)), np.nan)
    for row, name in enumerate(tasks):
        for column, element in enumerate(elements):
            values[row, column] = run.predictions[name].force_error_by_element.get(element, np.nan)
    figure = Figure(figsize=(max(1.5 + 0.55 * len(elements), 4.5), 1.1 + 0.45 * len(tasks)), layout="constrained")
    ax = figure.add_subplot()
    positive = values[np.isfinite(values) & (values > 0)]
    norm = LogNorm(positive.min(), positive.max()) if positive.size and positive.max() > positive.min() else None
    image = ax.imshow(values, norm=norm, cmap="YlOrRd", aspect="auto")
    ax.set_xticks(range(len(elements)), elements)
    ax.set_yticks(range(len(tasks)), tasks)
    middle = float(np.sqrt(positive.min() * positive.max())) if positive.size else 0.0
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = values[row, column]
        ax.text(
            column,
            row,
            f"{value:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if value > 2 * middle else "black",
        )
    figure.colorbar(image, ax=ax, label="force MAE, meV/Å")
    return figure


SPREAD_BINS = 10


def calibration_plots(run: RunData) -> Figure | None:
    """Root mean square error against the spread of the ensemble, in bins of equally many structures, by task.

    None where no task has an ensemble. On the diagonal, the spread is what the error is.
    """
    names = [name for name, data in run.predictions.items() if (data.energy_spread > 0).any()]
    if not names:
        return None
    figure, axes = _grid(len(names), columns=3, size=(3.4, 3.2))
    for ax, name in zip(axes, names, strict=True):
        data = run.predictions[name]
        known = data.energy_spread > 0
        spread, error = 1000 * data.energy_spread[known], 1000 * np.abs(data.energy_error[known])
        order = np.argsort(spread)
        bins = [part for part in np.array_split(order, min(SPREAD_BINS, len(order))) if len(part)]
        across = [float(np.sqrt((spread[part] ** 2).mean())) for part in bins]
        upward = [float(np.sqrt((error[part] ** 2).mean())) for part in bins]
        ax.scatter(spread, error, s=6, color="#bbbbbb", linewidths=0, label="structures")
        ax.plot(across, upward, "o-", color=COLOURS[0], markersize=4, label="bins")
        positive = [value for value in (*across, *upward) if value > 0] or [1.0]
        ends = [0.5 * min(positive), 2 * max(positive)]
        ax.plot(ends, ends, color="#888888", linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel="spread, meV/atom", ylabel="error, meV/atom", title=name)
        ax.set_ylim(bottom=0.1 * min(positive))
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def throughput(run: RunData) -> Figure:
    """Structures and atoms per second, and the share of time spent waiting for data, over steps."""
    rows = run.rows("train")
    figure, axes = _grid(3, columns=3, size=(3.6, 2.7))
    panels: tuple[tuple[str, str, float], ...] = (
        ("structures_per_s", "structures/s", 1.0),
        ("atoms_per_s", "atoms/s", 1.0),
        ("data_wait_share", "waiting for data, %", 100.0),
    )
    for ax, (key, label, factor) in zip(axes, panels, strict=True):
        values: list[Any] = [factor * row[key] for row in rows]
        ax.plot([row["step"] for row in rows], values, color=COLOURS[0], linewidth=1)
        ax.set(xlabel="step", ylabel=label)
        ax.set_ylim(bottom=0)
    return figure
