"""Parity plots: predictions against labels, drawn as points or, if there are many, as a density."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hydrazero.shards.text.foreign_text import for_plot
from hydrazero.trainer.plots.panels import COLOURS, GREY, nothing, pairs_of_tasks, small_multiples

DENSITY_POINTS = 1000
"""Number of points above which their density is shown."""
CELLS = 80
"""Number of cells of the density along each axis."""
COLOUR_MAP = "viridis"

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Labels and predictions of one task."""

    energy: Array
    """Energies above the reference energies, eV per atom, [structures]; NaN where there is no label."""
    energy_predicted: Array
    """Predicted energies above the reference energies, eV per atom, [structures]."""
    forces: Array
    """Force components, eV/Å, [components]; empty if the task has none."""
    forces_predicted: Array
    """Predicted force components, eV/Å, [components]."""


@dataclass(frozen=True, kw_only=True)
class OtherParity:
    """Labels and predictions of stress or a target, component by component."""

    unit: str
    """Unit of both."""
    true: Array
    """Labels, [components]."""
    predicted: Array
    """Predictions, [components]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cloud:
    """Points of one parity plot."""

    ax: Axes
    """Axes of the plot."""
    true: Array
    """Labels, [points]."""
    predicted: Array
    """Predictions, [points]."""
    what: str
    """Quantity and unit, for the labels of the axes."""
    error: str
    """Text with the mean absolute error and the number of points."""

    @property
    def limits(self) -> tuple[float, float]:
        """Return the limits of both axes."""
        low = float(min(self.true.min(), self.predicted.min()))
        high = float(max(self.true.max(), self.predicted.max()))
        pad = 0.05 * (high - low) or 1.0
        return low - pad, high + pad

    @property
    def counts(self) -> Array:
        """Return the number of points in each cell, [predicted, true]."""
        box = [self.limits, self.limits]
        return np.histogram2d(self.predicted, self.true, bins=CELLS, range=box)[0].astype(np.float64)


def cloud(ax: Axes, true: Array, predicted: Array, what: str, unit: str) -> Cloud:
    """Return the known points of a plot; its error is shown in `unit`, thousandths of the unit of the values."""
    known = np.isfinite(true) & np.isfinite(predicted)
    true, predicted = true[known], predicted[known]
    mae = 1000 * float(np.abs(predicted - true).mean())
    return Cloud(ax=ax, true=true, predicted=predicted, what=what, error=f"MAE {mae:.3g} {unit}\nn = {len(true):,}")


def parity_plots(tasks: Mapping[str, Parity]) -> Figure:
    """Draw predicted against true energies (above references, per atom) and forces of each task."""
    figure, pairs = pairs_of_tasks(list(tasks), height=2.75)
    clouds = []
    for (upper, lower), data in zip(pairs, tasks.values(), strict=True):
        for ax, name, true, predicted, what, unit in (
            (upper, "energies", data.energy, data.energy_predicted, "energy, eV/atom", "meV/atom"),
            (lower, "forces", data.forces, data.forces_predicted, "force, eV/Å", "meV/Å"),
        ):
            if (np.isfinite(true) & np.isfinite(predicted)).any():
                clouds.append(cloud(ax, true, predicted, what, unit))
            else:  # a run that has diverged has labels, but no finite predictions
                nothing(ax, f"{name} are not finite" if np.isfinite(true).any() else f"no {name}")
    draw(figure, clouds)
    return figure


def other_parity_plots(tasks: Mapping[str, Mapping[str, OtherParity]]) -> Figure | None:
    """Draw predicted against true stress and targets of each task; return None if no task has any."""
    shown = [(task, name, found) for task, others in tasks.items() for name, found in others.items()]
    if not shown:
        return None
    figure, axes = small_multiples(len(shown), height=2.75)
    clouds = []
    for ax, (task, name, found) in zip(axes, shown, strict=True):
        ax.set_title(for_plot(task), fontweight="bold", fontsize=10)
        mae = float(np.abs(found.predicted - found.true).mean())
        error = f"MAE {mae:.3g} {found.unit}\nn = {len(found.true):,}"
        what = f"{name}, {found.unit}" if found.unit else name
        clouds.append(Cloud(ax=ax, true=found.true, predicted=found.predicted, what=what, error=error))
    draw(figure, clouds)
    return figure


def draw(figure: Figure, clouds: list[Cloud]) -> None:
    """Draw points, or their density in colours that all axes share."""
    dense = [one for one in clouds if len(one.true) > DENSITY_POINTS]
    norm = LogNorm(1, max(max(float(one.counts.max()) for one in dense), 2)) if dense else None
    for one in clouds:
        ax, limits = one.ax, one.limits
        ax.plot(limits, limits, color=GREY, linewidth=0.8, zorder=1)
        if one in dense:
            edges = np.linspace(*limits, CELLS + 1)
            counts = np.ma.masked_equal(one.counts, 0)
            ax.pcolormesh(edges, edges, counts, norm=norm, cmap=COLOUR_MAP, zorder=2, rasterized=True)
        else:
            ax.scatter(one.true, one.predicted, s=9, color=COLOURS[0], alpha=0.6, linewidths=0, zorder=2)
        ax.set(
            xlim=limits,
            ylim=limits,
            aspect="equal",
            xlabel=for_plot(f"true {one.what}"),
            ylabel=for_plot(f"predicted {one.what}"),
        )
        ax.locator_params(nbins=4)
        ax.text(0.04, 0.96, for_plot(one.error), va="top", fontsize=8, transform=ax.transAxes)
    if norm is not None:
        bar = figure.colorbar(
            ScalarMappable(norm=norm, cmap=COLOUR_MAP),
            ax=[one.ax for one in clouds],
            location="bottom",
            shrink=min(3.5 / figure.get_figwidth(), 1.0),
            aspect=35,
            pad=0.02,
        )
        bar.set_label("number of structures or force components in a cell", fontsize=9)
        bar.ax.tick_params(labelsize=8)
