"""The figure of a plan: model states by part and ZeRO stage, the parts of a step's duration, and scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydrazero.launch.plan.scaling import RANKS
from hydrazero.launch.plan.tables import SHOWN_STATES, show_bytes, show_seconds

COLOURS = ("#4878a8", "#e08a3c", "#5a9e6f", "#b04a5a", "#8a6bb1")
SHOWN_SHARE = 0.005
"""Smallest fraction of a step for which a bar is drawn."""


def draw(plan: dict[str, Any], out: Path) -> None:
    """Write the figure as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    stages, times, curves = figure.subplots(1, 3, width_ratios=[1.2, 1.1, 1.3])
    _memory(stages, plan)
    _step(times, plan)
    _scaling(curves, plan)
    site, by = plan["site"], plan["deepspeed"]
    figure.suptitle(
        f"{plan['run']} on {site['name']}: {site['nodes']:,} nodes, {site['ranks']:,} ranks, ZeRO {by['stage']}, "
        f"{by['precision']}"
    )
    figure.savefig(out, dpi=120)


def _memory(axes: Any, plan: dict[str, Any]) -> None:
    """Draw the memory that does not depend on the batch, part by part; activations would hide it."""
    own = next(row for row in plan["memory"] if row["own"])
    rows = [row for row in plan["memory"] if row["precision"] == own["precision"]]
    labels = [f"ZeRO {row['stage']}" + ("" if row["fits"] else "\n(too much)") for row in rows]
    below = [0.0] * len(rows)
    for part, colour in zip(SHOWN_STATES, COLOURS, strict=True):
        values = [row[part] / 1e6 for row in rows]
        axes.bar(labels, values, bottom=below, label=part, color=colour, width=0.6)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_ylabel("MB per device")
    axes.set_ylim(0, 1.35 * max(below))
    axes.legend(ncols=3, fontsize=8, loc="upper center")
    usable, whole = (show_bytes(plan["memory_of_die"][key]) for key in ("room", "bytes"))
    activations = show_bytes(own["activations"])
    axes.set_title(
        f"model states (activations: {activations} more);\n{usable} of a device's {whole} may be used", fontsize=10
    )


def _step(axes: Any, plan: dict[str, Any]) -> None:
    step = plan["step"]
    parts = {"compute": step["compute"], "optimizer": step["optimizer"]}
    for row in plan["messages"]:
        name = f"{row['kind']}\n{row['of']}"
        parts[name] = parts.get(name, 0.0) + row["count"] * row["seconds"]
    parts = {name: value for name, value in parts.items() if value > SHOWN_SHARE * step["seconds"]}
    bars = axes.barh(
        list(parts), [1e3 * value for value in parts.values()], color=[COLOURS["\n" in name] for name in parts]
    )
    axes.bar_label(bars, [show_seconds(value) for value in parts.values()], padding=3, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("ms")
    waits = "; data loading takes longer" if step["data"] >= step["seconds"] else ""
    axes.set_title(f"one step: {show_seconds(step['seconds'])}{waits}", fontsize=10)


def _scaling(axes: Any, plan: dict[str, Any]) -> None:
    for kind, colour, marker in (("weak", COLOURS[0], "o"), ("strong", COLOURS[1], "s")):
        rows = plan["scaling"][kind]
        ranks, efficiency = [row["ranks"] for row in rows], [100 * row["efficiency"] for row in rows]
        axes.plot(ranks, efficiency, color=colour, marker=marker, label=kind)
    own = plan["site"]["ranks"]
    shown = [row["ranks"] for row in plan["scaling"]["weak"] if row["ranks"] in RANKS]  # its own size may be near one
    axes.axvline(own, color="#9a9a9a", linestyle="--", label=f"this plan: {own:,}", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [f"{count:,}" for count in shown], rotation=45, fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0, 105)
    axes.set_xlabel("ranks")
    axes.set_ylabel("efficiency, %")
    axes.set_title(f"scaling; strong: {plan['scaling']['batches']:,} batches per step", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
