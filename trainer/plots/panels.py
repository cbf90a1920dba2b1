"""Figures of many similar axes that fit the width of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hydrazero.shards.text.foreign_text import for_plot

COLOURS = ("#3366aa", "#cc6633", "#338855", "#aa3377", "#776644", "#2299bb", "#998822", "#884444")
"""Colours of runs, or of lines in the same axes."""
GREY = "#999999"
PAGE = 10.8
"""Width of a page in inches of 100 pixels."""
IN_A_ROW = 4
"""Maximum number of axes in a row."""
WIDEST = 3.6
"""Maximum width of one of several axes, inches."""


def columns_for(count: int) -> int:
    """Return the number of axes in a row with which all rows are about equally full."""
    return -(-count // -(-count // IN_A_ROW))


def small_multiples(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` axes, up to four in a row; each is `height` inches high."""
    columns = columns_for(count)
    rows = -(-count // columns)
    figure = Figure(figsize=(min(PAGE / columns, WIDEST) * columns, height * rows + 0.2), layout="constrained")
    axes = [plain_axes(figure.add_subplot(rows, columns, number + 1)) for number in range(count)]
    return figure, axes


def pairs_of_tasks(tasks: Sequence[str], *, height: float) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Return a figure with two axes for each task, one above the other, up to four tasks in a row."""
    columns = columns_for(len(tasks))
    rows = 2 * -(-len(tasks) // columns)
    figure = Figure(figsize=(min(PAGE / columns, WIDEST) * columns, height * rows + 0.2), layout="constrained")
    pairs = []
    for number, task in enumerate(tasks):
        row, column = divmod(number, columns)
        first = 2 * row * columns + column + 1
        upper, lower = (plain_axes(figure.add_subplot(rows, columns, place)) for place in (first, first + columns))
        upper.set_title(for_plot(task), fontweight="bold", fontsize=10)
        pairs.append((upper, lower))
    return figure, pairs


def plain_axes(ax: Axes) -> Axes:
    """Set small labels and a thin grid, remove the frame at the top and right, and return the axes."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.tick_params(labelsize=8)
    ax.xaxis.label.set_fontsize(9)
    ax.yaxis.label.set_fontsize(9)
    return ax


def nothing(ax: Axes, text: str) -> None:
    """Replace axes without data by a text."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, for_plot(text), ha="center", va="center", color=GREY, transform=ax.transAxes)


def log_scale(ax: Axes) -> None:
    """Use a logarithmic scale for values if all those of the lines are above 0."""
    values = [np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.get_lines()]
    if any(each.size for each in values) and all((each > 0).all() for each in values):
        ax.set_yscale("log")
        plain_logarithms(ax.yaxis)


def plain_logarithms(axis: Axis) -> None:
    """Label a logarithmic axis of small axes with a few plain numbers; its limits must have been set."""
    low, high = axis.get_view_interval()
    decades = float(np.log10(high / low))
    steps = (1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    if decades > 0.7:
        axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    else:  # so few decades that none of these ticks might be within the limits
        axis.set_major_locator(MaxNLocator(3))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, entries: Sequence[tuple[Any, str]]) -> None:
    """Add a legend with entries (handle, text) below all axes."""
    handles, labels = [handle for handle, _ in entries], [for_plot(text) for _, text in entries]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)


def colour_of(number: int) -> str:
    """Return the colour of a run by its number."""
    return COLOURS[number % len(COLOURS)]
