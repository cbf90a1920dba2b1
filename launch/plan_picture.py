"""The picture of a plan: memory by part and ZeRO stage, where a step's time goes, and scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydrazero.launch.plan_tables import SHOWN_PARTS

COLOURS = ("#4878a8", "#e08a3c", "#5a9e6f", "#b04a5a", "#8a6bb1", "#9a9a9a")


def draw(plan: dict[str, Any], out: Path) -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    stages, times, curves = figure.subplots(1, 3, width_ratios=[1.3, 1, 1.3])
    _memory(stages, plan)
    _step(times, plan)
    _scaling(curves, plan)
    site = plan["site"]
    figure.suptitle(f"{plan['run']} on {site['name']}: {site['nodes']:,} nodes, {site['ranks']:,} ranks")
    figure.savefig(out, dpi=120)


def _memory(axes: Any, plan: dict[str, Any]) -> None:
    """Of the run's own precision: what grows with the model, part by part."""
    own = next(row for row in plan["memory"] if row["own"])
    rows = [row for row in plan["memory"] if row["precision"] == own["precision"]]
    labels = [f"ZeRO {row['stage']}" for row in rows]
    below = [0.0] * len(rows)
    for part, colour in zip(SHOWN_PARTS, COLOURS, strict=True):
        values = [row[part] / 1e9 for row in rows]
        axes.bar(labels, values, bottom=below, label=part, color=colour, width=0.6)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_ylabel("GB on a die")
    axes.set_title(f"memory, {own['precision']}; a die has {plan['memory_of_die']['bytes'] / 1e9:.3g} GB", fontsize=10)
    axes.set_ylim(0, 1.45 * max(below))
    axes.legend(ncols=2, fontsize=8, loc="upper left")


def _step(axes: Any, plan: dict[str, Any]) -> None:
    parts = [("compute", plan["step"]["compute"]), ("optimizer", plan["step"]["optimizer"])]
    parts += [(f"{row['kind']}\n{row['of']}", row["count"] * row["seconds"]) for row in plan["messages"]]
    parts = [part for part in parts if part[1] > 0.005 * plan["step"]["seconds"]]
    names, seconds = zip(*parts, strict=True)
    colours = [COLOURS["\n" in name] for name in names]
    axes.barh(names, [1e3 * value for value in seconds], color=colours)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("ms")
    axes.set_title(f"a step: {1e3 * plan['step']['seconds']:,.4g} ms", fontsize=10)


def _scaling(axes: Any, plan: dict[str, Any]) -> None:
    for kind, colour, marker in (("weak", COLOURS[0], "o"), ("strong", COLOURS[1], "s")):
        rows = plan["scaling"][kind]
        ranks, efficiency = [row["ranks"] for row in rows], [100 * row["efficiency"] for row in rows]
        axes.plot(ranks, efficiency, color=colour, marker=marker, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 105)
    axes.set_xlabel("ranks")
    axes.set_ylabel("efficiency, %")
    axes.set_title("scaling", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
