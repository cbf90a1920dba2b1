"""The tables that `hydrazero plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

SHOWN_PARTS = ("weights", "gradients", "optimizer", "average", "buffers", "activations")
LEFT = ("precision", "collective", "of", "by", "heads", "", "value", "way", "source")


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right", no_wrap=heading != "source")
    return table


def tables(plan: dict[str, Any]) -> list[Table]:
    """Return all tables of a plan."""
    makers = (summary, memory, traffic, stages, scaling, heads, numbers, ways)
    return [make(plan) for make in makers]


def summary(plan: dict[str, Any]) -> Table:
    """Return the run, its step, files and epoch."""
    site, batch, step, files, epoch = (plan[key] for key in ("site", "batch", "step", "files", "epoch"))
    model, pace, by = plan["model"], plan["pace"], plan["deepspeed"]
    own = next(row for row in plan["memory"] if row["own"])
    data = "data unknown" if pace["atoms_of_worker"] is None else f"{_seconds(step['data'])} for data beside them"
    table = _table(f"{plan['run']} on {site['name']}", ["", "value"])
    table.show_header = False
    for name, value in (
        ("ranks", f"{site['ranks']:,} on {site['nodes']:,} nodes"),
        (
            "model",
            f"{model['encoder']}, {model['encoder_parameters']:,} parameters shared, {model['heads']:,} of heads",
        ),
        ("DeepSpeed", f"ZeRO {by['stage']}, {by['precision']}{', compiled' if by['compiled'] else ''}"),
        (
            "batch",
            f"{batch['structures_filled']} structures of {batch['atoms_of_structure']:.0f} atoms a rank, "
            f"{batch['accumulation']} a step: {batch['global_batch']:,} structures a step",
        ),
        ("memory", _of(own["total"], plan["memory_of_die"]) + " on a die"),
        ("main memory", _of(plan["memory_of_node"]["total"], plan["memory_of_node"]) + " on a node"),
        (
            "a step",
            f"{_seconds(step['seconds'])}: {_seconds(step['compute'])} compute, {_seconds(step['communication'])} "
            f"communication, {data}",
        ),
        ("computes at", f"{pace['share']:.0%} of the roofline ({pace['source']})"),
        (
            "shards",
            f"{files['shards']:,} files, {_bytes(files['bytes'])}; {files['shards_per_rank']:.2g} a rank, read "
            f"{files['amplification']:.2g} times",
        ),
        (
            "opens",
            f"{files['opens_at_start']:,.0f} at the start ({_seconds(files['seconds_of_opens_at_start'])}), then "
            f"{files['opens_per_s']:,.0f} a second, {_share(files['opens_share'])} what the file system can",
        ),
        (
            "copies",
            f"on each node's {files['node_local']}, {_seconds(files['seconds_of_staging'])} to make; opens and reading "
            "are theirs then"
            if files["node_local"]
            else "none: nodes have no disks of their own",
        ),
        (
            "reading",
            f"{_bytes(files['bandwidth'])}/s of all ranks, {_share(files['bandwidth_share'])} the file system's",
        ),
        (
            "an epoch",
            f"{epoch['structures']:,} structures, {epoch['steps']:,} steps, {_hours(epoch['hours'])}, "
            f"{epoch['node_hours']:,.0f} node-hours, {epoch['jobs']:.0f} jobs of {epoch['hours_of_job']:g} h",
        ),
        ("the run", f"{epoch['run_epochs']:.2g} epochs, {_hours(epoch['run_hours'])}"),
    ):
        table.add_row(name, value)
    return table


def memory(plan: dict[str, Any]) -> Table:
    """Return what a die holds, a row for each precision and ZeRO stage."""
    table = _table("memory of a die, MB", ["precision", "ZeRO", *SHOWN_PARTS, "total", "stream,\nhost"])
    for row in plan["memory"]:
        parts = [f"{row[part] / 1e6:,.1f}" for part in SHOWN_PARTS]
        total = f"{row['total'] / 1e6:,.0f}" + ("" if row["fits"] else " (too much)")
        style = "bold" if row["own"] else None
        table.add_row(row["precision"], str(row["stage"]), *parts, total, f"{row['stream'] / 1e6:,.0f}", style=style)
    return table


def traffic(plan: dict[str, Any]) -> Table:
    """Return what a step sends."""
    headings = ["collective", "of", "times", "bytes", "node\nlinks, MB", "network,\nMB", "ms", "by"]
    table = _table("communication of a step, of each rank", headings)
    for row in plan["messages"]:
        times = row["count"]
        table.add_row(
            row["kind"],
            row["of"],
            f"{times:g}",
            f"{row['bytes']:,.0f}",
            f"{times * row['node_bytes'] / 1e6:,.4g}",
            f"{times * row['network_bytes'] / 1e6:,.4g}",
            f"{1e3 * times * row['seconds']:,.3g}",
            row["algorithm"],
        )
    return table


def stages(plan: dict[str, Any]) -> Table:
    """Return the step under each ZeRO stage."""
    headings = ["ZeRO", "compute, ms", "optimizer, ms", "communication, ms", "step, ms", "if all\noverlapped"]
    table = _table("a step under each ZeRO stage", headings)
    for row in plan["stages"]:
        values = [1e3 * row[key] for key in ("compute", "optimizer", "communication", "seconds")]
        values.append(1e3 * max(row["compute"] + row["optimizer"], row["communication"], row["data"]))
        stage = f"{row['stage']}" + ("" if row["fits"] else " (too much memory)")
        table.add_row(stage, *(f"{value:,.3g}" for value in values), style="bold" if row["own"] else None)
    return table


def scaling(plan: dict[str, Any]) -> Table:
    """Return steps on more and more ranks."""
    headings = ["ranks", "weak: step, ms", "efficiency", "strong: step, ms", "efficiency"]
    table = _table("scaling: weak keeps each rank's batches, strong 16,384 batches a step", headings)
    strong = {row["ranks"]: row for row in plan["scaling"]["strong"]}
    for row in plan["scaling"]["weak"]:
        other = strong.get(row["ranks"])
        cells = ["", ""] if other is None else [f"{1e3 * other['seconds']:,.4g}", f"{other['efficiency']:.1%}"]
        table.add_row(f"{row['ranks']:,}", f"{1e3 * row['seconds']:,.4g}", f"{row['efficiency']:.1%}", *cells)
    return table


def heads(plan: dict[str, Any]) -> Table:
    """Return a step with the heads everywhere, and in groups of ranks by task."""
    headings = ["heads", "compute, ms", "communication, ms", "step, ms", "sent, MB", "states, MB"]
    table = _table("where heads live", headings)
    names = {"everywhere": "of all tasks on every rank", "groups": "of one task in each group of ranks"}
    for name, row in plan["heads"].items():
        values = [1e3 * row[key] for key in ("compute", "communication", "seconds")]
        values += [row[key] / 1e6 for key in ("bytes", "states")]
        table.add_row(names[name], *(f"{value:,.4g}" for value in values))
    return table


def numbers(plan: dict[str, Any]) -> Table:
    """Return the site's numbers with their sources."""
    table = _table(f"{plan['site']['name']}: numbers and where they are from", ["", "value", "source"])
    for name, row in plan["sources"].items():
        table.add_row(name, f"{row['value']:.4g}", row["source"])
    return table


def ways(plan: dict[str, Any]) -> Table:
    """Return how the site's library does collectives, with the sources."""
    site, collectives = plan["site"]["name"], plan["collectives"]
    headings = ["way", "start, us", "a step\nin a node, us", "between\nnodes, us", "of the\nbandwidth", "source"]
    table = _table(f"{site}: collectives of {collectives['library']}", headings)
    for way in collectives["ways"]:
        name = ", ".join(filter(None, (way["algorithm"].replace("_", " "), way["protocol"])))
        times = [f"{1e6 * way[key]:.3g}" for key in ("start", "node_step", "network_step")]
        table.add_row(name, *times, f"{way['bandwidth_share']:.0%}", way["source"])
    return table


def _of(taken: float, memory: dict[str, float]) -> str:
    return f"{_bytes(taken)} of {_bytes(memory['bytes'])}, of which {_bytes(memory['room'])} may be taken,"


def _share(value: float) -> str:
    return f"{value:.2g} times" if value > 1 else f"{value:.1%} of"


def _bytes(count: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count / 1e3:,.3g} kB"


def _seconds(value: float) -> str:
    return f"{value:,.3g} s" if value >= 1 else f"{1e3 * value:,.3g} ms"


def _hours(value: float) -> str:
    if value >= 1:
        return f"{value:,.3g} h"
    return f"{60 * value:,.3g} min" if value >= 1 / 60 else _seconds(3600 * value)
