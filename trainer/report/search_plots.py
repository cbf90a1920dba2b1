"""Figures of a search: errors over time and rungs, the Pareto front, errors by setting, importances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hydrazero.shards.text.foreign_text import for_plot
from hydrazero.trainer.plots.panels import (
    GREY,
    PAGE,
    colour_of,
    legend_below,
    plain_axes,
    plain_logarithms,
    small_multiples,
)
from hydrazero.trainer.search.space import Choices, Range, SearchSpace
from hydrazero.trainer.search.trial_rows import TrialRow, front_rows, short_names

WORST = 2.0
"""Error above which trials are drawn at the edge; the scale of a diverged trial would compress all others."""
RATES = {"inference": "inference, structures/s", "training": "training, structures/s"}
"""Labels of the speeds in a result."""


@dataclass(frozen=True, kw_only=True)
class TrialColours:
    """Colours of trials by their choice of one setting."""

    key: str
    """The setting; empty if all trials have the same colour."""
    by_value: Mapping[Any, str]
    """Colour of each choice."""

    def of(self, row: TrialRow) -> str:
        """Return the colour of a trial."""
        return self.by_value.get(row.values.get(self.key), colour_of(0))

    def entries(self) -> list[tuple[Line2D, str]]:
        """Return the entries of a legend."""
        return [(_dot(colour), str(value)) for value, colour in self.by_value.items()]


def _dot(colour: str, marker: str = "o", **style: Any) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, **style)


def _draw(ax: Axes, place: float, error: float, **style: Any) -> None:
    """Draw a trial at its error, or at the edge if that is too large."""
    ax.plot(place, min(error, WORST), "o" if error <= WORST else "^", clip_on=False, **style)


def _edge_entry(rows: Sequence[TrialRow]) -> list[tuple[Line2D, str]]:
    """Return the entry of a legend for trials at the edge, if there are any."""
    beyond = any(each["error"] > WORST for row in rows for each in row.results)
    return [(_dot(GREY, "^"), f"above {WORST:g}")] if beyond else []


def colours_of(space: SearchSpace) -> TrialColours:
    """Return colours by the first setting that is chosen from a list of texts, such as the encoder."""
    for key, parameter in space.vary.items():
        if isinstance(parameter, Choices) and len(parameter.values) > 1 and isinstance(parameter.values[0], str):
            return TrialColours(key=key, by_value={value: colour_of(n) for n, value in enumerate(parameter.values)})
    return TrialColours(key="", by_value={})


def progress_picture(rows: Sequence[TrialRow], space: SearchSpace, colours: TrialColours) -> Figure:
    """Draw errors over the time of the search, with the lowest so far, and each trial's error from rung to rung."""
    figure = Figure(figsize=(PAGE, 3.6), layout="constrained")
    over_time, over_rungs = (plain_axes(figure.add_subplot(1, 2, place)) for place in (1, 2))
    _errors_over_time(over_time, rows, space, colours)
    for row in rows:
        seconds, errors = zip(*((each["seconds"], each["error"]) for each in row.results), strict=True)
        over_rungs.plot(seconds, np.minimum(errors, WORST), color=colours.of(row), linewidth=1.0, alpha=0.8)
        for each in row.results:
            style: dict[str, Any] = {"alpha": 0.8, "markersize": 3}
            _draw(over_rungs, each["seconds"], each["error"], color=colours.of(row), **style)
    over_rungs.set_xscale("log")
    over_rungs.set(xlabel="training, s", title="errors from rung to rung")
    over_rungs.set_xticks(list(space.rungs), [f"{seconds:.3g}" for seconds in space.rungs])
    over_rungs.xaxis.set_minor_locator(_no_ticks())
    for ax in (over_time, over_rungs):
        _logarithmic_errors(ax)
        ax.title.set_fontsize(10)
    last = (_dot(GREY), f"finished, {space.rungs[-1]:.3g} s")
    earlier = (_dot(GREY, markerfacecolor="none"), "an earlier rung")
    line = (Line2D([], [], color="black", linewidth=1.2), "lowest of the finished trials so far")
    legend_below(figure, [*colours.entries(), last, earlier, *_edge_entry(rows), line])
    return figure


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _errors_over_time(ax: Axes, rows: Sequence[TrialRow], space: SearchSpace, colours: TrialColours) -> None:
    start = min(row.began for row in rows)
    finished = []
    for row in rows:
        for rung, each in enumerate(row.results):
            minutes, last = (each["at"] - start) / 60, rung == space.search.rungs - 1
            face = colours.of(row) if last else "none"
            _draw(ax, minutes, each["error"], color=colours.of(row), markerfacecolor=face, markersize=4.5)
            finished += [(minutes, each["error"])] if last else []
    if finished:
        minutes, errors = np.array(sorted(finished)).T
        ax.step(minutes, np.minimum.accumulate(errors), where="post", color="black", linewidth=1.2, zorder=0)
    ax.set(xlabel="minutes since the start", title="errors over time")


def _logarithmic_errors(ax: Axes) -> None:
    ax.set_ylabel("error / trivial error")
    ax.set_yscale("log")
    plain_logarithms(ax.yaxis)


def front_picture(rows: Sequence[TrialRow], space: SearchSpace, colours: TrialColours) -> Figure:
    """Draw errors against structures per second in inference and in training, with the Pareto fronts."""
    figure = Figure(figsize=(PAGE, 3.8), layout="constrained")
    rungs = space.search.rungs
    for place, (rate, label) in enumerate(RATES.items(), start=1):
        ax = plain_axes(figure.add_subplot(1, 2, place))
        for row in rows:
            last, finished = row.results[-1], len(row.results) == rungs
            face, ink = (colours.of(row), 1.0) if finished else ("none", 0.7)
            style: dict[str, Any] = {"markerfacecolor": face, "alpha": ink, "markersize": 6 if finished else 4}
            _draw(ax, last[rate], last["error"], color=colours.of(row), **style)
        front = [(row.results[-1][rate], row.results[-1]["error"]) for row in front_rows(rows, rate, rungs)]
        if front:
            ax.plot(*zip(*front, strict=True), color="black", linewidth=1.2, zorder=0, drawstyle="steps-pre")
        ax.set_xscale("log")
        plain_logarithms(ax.xaxis)
        ax.set_xlabel(label)
        _logarithmic_errors(ax)
    line = (Line2D([], [], color="black", linewidth=1.2), "Pareto front of the finished trials")
    pruned = (_dot(GREY, markerfacecolor="none"), "pruned, at its last rung")
    legend_below(figure, [*colours.entries(), pruned, *_edge_entry(rows), line])
    return figure


def settings_picture(rows: Sequence[TrialRow], space: SearchSpace, colours: TrialColours) -> Figure:
    """Draw errors at the first rung against each setting that was varied."""
    varied = {key: p for key, p in space.vary.items() if not isinstance(p, Choices) or len(p.values) > 1}
    names = short_names(list(varied))
    figure, axes = small_multiples(len(varied), height=2.3)
    for ax, (key, parameter) in zip(axes, varied.items(), strict=True):
        for row in rows:
            value = row.values[key]
            place = [*parameter.values].index(value) if isinstance(parameter, Choices) else float(value)
            _draw(ax, place, row.results[0]["error"], color=colours.of(row), markersize=3.5, alpha=0.8)
        _scale_of(ax, parameter)
        ax.set_xlabel(for_plot(names[key]))
        _logarithmic_errors(ax)
    entries = [*colours.entries(), *_edge_entry(rows)]
    if entries:
        legend_below(figure, entries)
    return figure


def _scale_of(ax: Axes, parameter: Range | Choices) -> None:
    if isinstance(parameter, Choices):
        names = [for_plot(value) for value in parameter.values]
        turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        slanted = turned if max(map(len, names)) > 3 else {}
        ax.set_xticks(range(len(names)), names, **slanted)
        ax.set_xlim(-0.5, len(names) - 0.5)
    elif parameter.log:
        ax.set_xscale("log")
        plain_logarithms(ax.xaxis)
    else:
        ax.locator_params(axis="x", nbins=5, integer=parameter.whole)


def importance_picture(values: Mapping[str, float]) -> Figure:
    """Draw importances as horizontal bars, with the largest at the top."""
    figure = Figure(figsize=(PAGE / 2, 0.28 * len(values) + 0.7), layout="constrained")
    ax = plain_axes(figure.add_subplot())
    names = short_names(list(values))
    ax.barh([for_plot(names[key]) for key in values], list(values.values()), color=colour_of(0), height=0.6)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("importance")
    return figure
