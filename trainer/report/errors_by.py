"""Figures of errors by number of atoms, element, length of the force, and spread of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hydrazero.shards.text.foreign_text import for_plot
from hydrazero.trainer.plots.panels import (
    COLOURS,
    GREY,
    colour_of,
    legend_below,
    nothing,
    pairs_of_tasks,
    plain_logarithms,
    small_multiples,
)
from hydrazero.trainer.report.run_data import Array, RunData, tasks_of

BINS = 12
"""Maximum number of bins of errors by size or force."""
SMALLEST_BIN = 20
"""Minimum number of values in a bin, if there are that many."""
SPREAD_BINS = 10
"""Maximum number of bins of the spread."""


@dataclass(frozen=True, kw_only=True)
class ErrorBins:
    """Errors in bins of another quantity, [bins] each."""

    at: Array
    """Median of the other quantity in each bin."""
    median: Array
    """Median of the errors."""
    low: Array
    """The 10% quantile of the errors."""
    high: Array
    """The 90% quantile of the errors."""


def error_bins(at: Array, errors: Array) -> ErrorBins | None:
    """Return errors in bins of another quantity, `at`; both are [n]. Return None if there are no errors.

    There is a bin for each distinct value of `at` if these are few and occur repeatedly. Otherwise all bins contain
    about the same number of errors.
    """
    known = np.isfinite(at) & np.isfinite(errors)
    at, errors = at[known], errors[known]
    if not len(at):
        return None
    distinct, group = np.unique(at, return_inverse=True)
    if len(distinct) <= BINS and len(distinct) < len(at):
        parts = [np.flatnonzero(group == number) for number in range(len(distinct))]
    else:
        count = int(np.clip(len(at) // SMALLEST_BIN, 1, BINS))
        parts = np.array_split(np.argsort(at, kind="stable"), count)
    quantiles = np.array([np.quantile(errors[part], (0.1, 0.5, 0.9)) for part in parts])
    low, median, high = quantiles.T
    return ErrorBins(at=np.array([np.median(at[part]) for part in parts]), median=median, low=low, high=high)


def _draw(ax: Axes, found: ErrorBins, colour: str, *, band: bool) -> None:
    """Draw the medians and, with `band`, the range from the 10% to the 90% quantile."""
    ax.plot(found.at, found.median, "o-", color=colour, markersize=3, linewidth=1.2)
    if band and len(found.at) > 1:
        ax.fill_between(found.at, found.low, found.high, color=colour, alpha=0.18, linewidth=0)
    elif band:
        ax.vlines(found.at, found.low, found.high, color=colour, alpha=0.4, linewidth=5)


def _legend(figure: Figure, runs: Sequence[RunData]) -> None:
    if len(runs) > 1:
        legend_below(figure, [(Line2D([], [], color=colour_of(n)), run.label) for n, run in enumerate(runs)])


def size_errors(runs: Sequence[RunData]) -> Figure:
    """Draw errors of energies and forces against the number of atoms in a structure, two axes for each task."""
    tasks = [name for name in tasks_of(runs) if any(name in run.predictions for run in runs)]
    figure, pairs = pairs_of_tasks(tasks, height=1.9)
    for task, (upper, lower) in zip(tasks, pairs, strict=True):
        energies, forces = {}, {}
        for number, run in enumerate(runs):
            if (data := run.predictions.get(task)) is not None:
                energies[number] = error_bins(data.atoms, 1000 * np.abs(data.energy_predicted - data.energy))
                errors = np.abs(data.forces_predicted - data.forces).reshape(-1, 3).mean(axis=1)
                forces[number] = error_bins(data.force_atoms, 1000 * errors)
        _of_size(upper, energies, "energy, meV/atom", band=len(runs) == 1)
        _of_size(lower, forces, "force, meV/Å", band=len(runs) == 1)
    _legend(figure, runs)
    return figure


def _of_size(ax: Axes, of_runs: Mapping[int, ErrorBins | None], label: str, *, band: bool) -> None:
    found = {number: one for number, one in of_runs.items() if one is not None}
    if not found:
        nothing(ax, f"no {label.split(',')[0]} labels")
        return
    for number, one in found.items():
        _draw(ax, one, colour_of(number), band=band)
    ax.set(ylabel=label, xlabel="number of atoms")
    if all((one.median > 0).all() for one in found.values()):
        ax.set_yscale("log")
        # A bin with errors near 0 must not stretch the axis over many decades.
        low = min(float(one.median.min()) for one in found.values())
        high = max(float((one.high if band else one.median).max()) for one in found.values())
        ax.set_ylim((0.2 if band else 0.6) * low, 1.4 * high)
        plain_logarithms(ax.yaxis)
    _whole_numbers(ax, list(found.values()))


def _whole_numbers(ax: Axes, found: Sequence[ErrorBins]) -> None:
    """Set ticks at the numbers of atoms that occur if these are few, and at whole numbers otherwise."""
    at = np.unique(np.concatenate([one.at for one in found]))
    if len(at) <= 4 and (at % 1 == 0).all():
        ax.set_xticks(at, [f"{value:g}" for value in at])
        ax.margins(x=0.2)
    else:
        ax.locator_params(axis="x", nbins=5, integer=True)


def force_errors(runs: Sequence[RunData]) -> Figure | None:
    """Draw the length of the error of an atom's force against the length of the force; None if no task has forces."""
    tasks = [name for name in tasks_of(runs) if any(_has_forces(run, name) for run in runs)]
    if not tasks:
        return None
    figure, axes = small_multiples(len(tasks), height=2.2)
    for task, ax in zip(tasks, axes, strict=True):
        found = {number: one for number, run in enumerate(runs) if (one := _by_force(run, task)) is not None}
        ax.set_title(for_plot(task), fontweight="bold", fontsize=10)
        if not found:
            nothing(ax, "all forces are 0")
            continue
        for number, one in found.items():
            _draw(ax, one, colour_of(number), band=len(runs) == 1)
        ends = [min(float(one.at.min()) for one in found.values()), max(float(one.at.max()) for one in found.values())]
        ax.plot(ends, ends, color=GREY, linewidth=0.8, linestyle="--")
        ax.set(xscale="log", yscale="log", xlabel="true force, eV/Å", ylabel="error, eV/Å")
        plain_logarithms(ax.xaxis)
        plain_logarithms(ax.yaxis)
    _legend(figure, runs)
    return figure


def _by_force(run: RunData, task: str) -> ErrorBins | None:
    if not _has_forces(run, task):
        return None
    data = run.predictions[task]
    length = np.linalg.norm(data.forces.reshape(-1, 3), axis=1)
    error = np.linalg.norm((data.forces_predicted - data.forces).reshape(-1, 3), axis=1)
    # Forces that are 0 by symmetry cannot be shown on a logarithmic axis.
    return error_bins(np.where(length > 1e-6, length, np.nan), error)


def _has_forces(run: RunData, task: str) -> bool:
    return task in run.predictions and len(run.predictions[task].forces) > 0


def element_errors(run: RunData) -> Figure | None:
    """Draw a heat map of force errors by task and element; return None if no task has forces."""
    by_task = {name: data.force_error_by_element for name, data in run.predictions.items() if len(data.forces)}
    if not by_task:
        return None
    elements = sorted({e for errors in by_task.values() for e in errors}, key=lambda symbol: atomic_numbers[symbol])
    values = np.array([[errors.get(element, np.nan) for element in elements] for errors in by_task.values()])
    figure = Figure(figsize=(max(2.4 + 0.45 * len(elements), 4.5), 1.0 + 0.36 * len(by_task)), layout="constrained")
    ax = figure.add_subplot()
    positive = values[np.isfinite(values) & (values > 0)]
    norm = LogNorm(positive.min(), positive.max()) if positive.size and positive.max() > positive.min() else None
    image = ax.imshow(values, norm=norm, cmap="YlOrRd", aspect="auto")
    ax.set_xticks(range(len(elements)), elements)
    ax.set_yticks(range(len(by_task)), list(map(for_plot, by_task)))
    ax.tick_params(length=0)
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = values[row, column]
        ink = "white" if norm is not None and norm(value) > 0.65 else "black"
        ax.text(
            column,
            row,
            f"{value:.0f}" if value >= 100 else f"{value:.3g}",
            ha="center",
            va="center",
            fontsize=8,
            color=ink,
        )
    bar = figure.colorbar(image, ax=ax, label="force MAE, meV/Å")
    if norm is not None:
        plain_logarithms(bar.ax.yaxis)
    return figure


def calibration_plots(run: RunData) -> Figure | None:
    """Draw root mean square errors against the spread of the ensemble, with the same number of structures in each bin.

    Return None if no task has an ensemble. On the diagonal line, the error equals the spread.
    """
    errors = {
        name: np.where(data.energy_spread > 0, np.abs(data.energy_predicted - data.energy), np.nan)
        for name, data in run.predictions.items()
    }
    errors = {name: error for name, error in errors.items() if np.isfinite(error).any()}
    if not errors:
        return None
    figure, axes = small_multiples(len(errors), height=2.6)
    for ax, (name, all_errors) in zip(axes, errors.items(), strict=True):
        known = np.isfinite(all_errors)
        spread, error = 1000 * run.predictions[name].energy_spread[known], 1000 * all_errors[known]
        bins = np.array_split(np.argsort(spread), int(np.clip(len(spread) // SMALLEST_BIN, 1, SPREAD_BINS)))
        across = [float(np.sqrt((spread[part] ** 2).mean())) for part in bins]
        upward = [float(np.sqrt((error[part] ** 2).mean())) for part in bins]
        ax.scatter(spread, error, s=8, color="#999999", linewidths=0, label="structures")
        ax.plot(across, upward, "o-", color=COLOURS[0], markersize=4, label="root mean square in bins")
        positive = [value for value in (*across, *upward) if value > 0] or [1.0]
        ends = [0.5 * min(positive), 2 * max(positive)]
        ax.plot(ends, ends, color=GREY, linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel="spread, meV/atom", ylabel="error, meV/atom")
        ax.set_title(for_plot(name), fontweight="bold", fontsize=10)
        ax.set_ylim(bottom=0.1 * min((value for value in upward if value > 0), default=1.0))
        plain_logarithms(ax.xaxis)
        plain_logarithms(ax.yaxis)
    axes[0].legend(frameon=False, fontsize=8)
    return figure
