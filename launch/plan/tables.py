"""The tables that `hydrazero plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

SHOWN_STATES = ("weights", "gradients", "optimizer", "average", "buffers")
SHOWN_PARTS = (*SHOWN_STATES, "activations", "stream")
IN_MAIN_MEMORY = ("processes", "stream", "manifests", "offloaded", "dies")
LEFT = ("precision", "collective", "of", "by", "heads", "", "value", "way", "source")


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right", no_wrap=heading != "source")
    return table


def tables(plan: dict[str, Any]) -> list[Table]:
    """Return all tables of a plan."""
    makers = (summary, memory, main_memory, traffic, stages, scaling, heads, numbers, ways)
    return [make(plan) for make in makers]


def _jobs(number: float) -> str:
    return "1 job" if number == 1 else f"{number:,.0f} jobs"


def summary(plan: dict[str, Any]) -> Table:
    """Return the run, its step, files and epoch."""
    site, batch, step, files, epoch = (plan[key] for key in ("site", "batch", "step", "files", "epoch"))
    model, pace, by = plan["model"], plan["pace"], plan["deepspeed"]
    own = next(row for row in plan["memory"] if row["own"])
    jobs, run_jobs = _jobs(epoch["jobs"]), _jobs(epoch["run_jobs"])
    copies = " with the copies" if files["seconds_of_copying"] else ""
    data = "data unknown" if pace["atoms_of_worker"] is None else f"{show_seconds(step['data'])} for data beside them"
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
        ("memory", _of(own["total"], plan["memory_of_die"], "die")),
        ("main memory", _of(plan["memory_of_node"]["total"], plan["memory_of_node"], "node")),
        (
            "a step",
            f"{show_seconds(step['seconds'])}: {show_seconds(step['compute'])} compute, "
            f"{show_seconds(step['communication'])} communication, {data}",
        ),
        ("computes at", f"{pace['share']:.0%} of the roofline ({pace['source']})"),
        (
            "shards",
            f"{files['shards']:,} files, {show_bytes(files['bytes'])}; {files['shards_per_rank']:.2g} a rank, read "
            f"{files['amplification']:.2g} times",
        ),
        (
            "opens",
            f"{files['opens_at_start']:,.0f} at the start ({show_seconds(files['seconds_of_opens_at_start'])}), then "
            f"{files['opens_per_s']:,.0f} a second, {_share(files['opens_share'])} what the file system can",
        ),
        (
            "copies",
            f"on each node's {files['node_local']}, {show_seconds(files['seconds_of_copying'])} to make; opens and "
            "reading are theirs then"
            if files["node_local"]
            else "none: nodes have no disks of their own",
        ),
        (
            "reading",
            f"{show_bytes(files['bandwidth'])}/s of all ranks, {_share(files['bandwidth_share'])} the file system's",
        ),
        (
            "an epoch",
            f"{epoch['structures']:,} structures, {epoch['steps']:,} steps, {_hours(epoch['hours'])}, "
            f"{epoch['node_hours']:,.3g} node-hours, {jobs} of {epoch['hours_of_job']:,g} h",
        ),
        (
            "the run",
            f"{epoch['run_epochs']:.2g} epochs, {_hours(epoch['run_hours'])}; {run_jobs}{copies} "
            f"{_hours(epoch['run_hours_with_copies'])}, {epoch['run_node_hours']:,.0f} node-hours",
        ),
    ):
        table.add_row(name, value)
    return table


def memory(plan: dict[str, Any]) -> Table:
    """Return what a die holds, a row for each precision and ZeRO stage."""
    has = plan["memory_of_die"]
    whole, room = show_bytes(has["bytes"]), show_bytes(has["room"])
    title = f"memory of a rank, MB: {room} of a die's {whole} may be taken"
    table = _table(title, ["precision", "ZeRO", *SHOWN_PARTS, "of these\non the host", "on the\ndie"])
    for row in plan["memory"]:
        parts = [f"{row[part] / 1e6:,.1f}" for part in (*SHOWN_PARTS, "host")]
        total = f"{row['total'] / 1e6:,.0f}" + ("" if row["fits"] else " (too much)")
        table.add_row(row["precision"], str(row["stage"]), *parts, total, style="bold" if row["own"] else None)
    return table


def main_memory(plan: dict[str, Any]) -> Table:
    """Return what a node's main memory holds."""
    has = plan["memory_of_node"]
    whole, room = show_bytes(has["bytes"]), show_bytes(has["room"])
    title = f"main memory of a node, GB: {room} of {whole} may be taken"
    headings = ["processes", "stream", "manifests", "offloaded", "steps\non cores", "all"]
    table = _table(title, headings)
    table.add_row(*(f"{has[part] / 1e9:,.3g}" for part in (*IN_MAIN_MEMORY, "total")))
    return table


def traffic(plan: dict[str, Any]) -> Table:
    """Return what a step sends."""
    headings = ["collective", "of", "times", "bytes", "over links\nof the node", "over the\nnetwork", "ms", "by"]
    table = _table("communication of a step, of each rank", headings)
    for row in plan["messages"]:
        times = row["count"]
        table.add_row(
            row["kind"],
            row["of"],
            f"{times:g}",
            f"{row['bytes']:,.0f}",
            show_bytes(times * row["node_bytes"]),
            show_bytes(times * row["network_bytes"]),
            _ms(times * row["seconds"]),
            row["algorithm"],
        )
    return table


def stages(plan: dict[str, Any]) -> Table:
    """Return the step under each ZeRO stage."""
    headings = ["ZeRO", "compute, ms", "optimizer, ms", "communication, ms", "step, ms", "if all\noverlapped"]
    table = _table("a step under each ZeRO stage", headings)
    for row in plan["stages"]:
        values = [row[key] for key in ("compute", "optimizer", "communication", "seconds")]
        values.append(max(row["compute"] + row["optimizer"], row["communication"], row["data"]))
        stage = f"{row['stage']}" + ("" if row["fits"] else " (too much memory)")
        table.add_row(stage, *map(_ms, values), style="bold" if row["own"] else None)
    return table


def scaling(plan: dict[str, Any]) -> Table:
    """Return steps on more and more ranks."""
    batches = plan["scaling"]["batches"]
    headings = ["ranks", "weak: a step", "efficiency", "strong: a step", "efficiency"]
    table = _table(f"scaling: weak keeps a rank's batches, strong {batches:,} a step", headings)
    for weak, strong in zip(plan["scaling"]["weak"], plan["scaling"]["strong"], strict=True):
        cells = [text for row in (weak, strong) for text in (show_seconds(row["seconds"]), f"{row['efficiency']:.1%}")]
        own = weak["ranks"] == plan["site"]["ranks"]
        table.add_row(f"{weak['ranks']:,}", *cells, style="bold" if own else None)
    return table


def heads(plan: dict[str, Any]) -> Table:
    """Return a step with the heads everywhere, and in groups of ranks by task."""
    headings = ["heads", "compute, ms", "communication, ms", "step, ms", "sent", "states"]
    table = _table("where heads live", headings)
    names = {"everywhere": "of all tasks on every rank", "groups": "of one task in each group of ranks"}
    for name, row in plan["heads"].items():
        times = [_ms(row[key]) for key in ("compute", "communication", "seconds")]
        table.add_row(names[name], *times, *(show_bytes(row[key]) for key in ("bytes", "states")))
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
    headings = ["way", "start, µs", "a step\nin a node, µs", "between\nnodes, µs", "of the\nbandwidth", "source"]
    table = _table(f"{site}: collectives of {collectives['library']}", headings)
    for way in collectives["ways"]:
        name = ", ".join(filter(None, (way["algorithm"].replace("_", " "), way["protocol"])))
        times = [f"{1e6 * way[key]:.3g}" for key in ("start", "node_step", "network_step")]
        table.add_row(name, *times, f"{way['bandwidth_share']:.0%}", way["source"])
    return table


def _of(taken: float, memory: dict[str, float], where: str) -> str:
    room, whole = show_bytes(memory["room"]), show_bytes(memory["bytes"])
    return f"{show_bytes(taken)} on a {where}, which has {whole}; {room} may be taken"


def _share(value: float) -> str:
    return f"{value:.2g} times" if value > 1 else f"{value:.1%} of"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds >= 1e-6 or not seconds else "< 0.001"


def show_bytes(count: float) -> str:
    """Show bytes in a unit that suits them."""
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count:,.3g} B"


def show_seconds(value: float) -> str:
    """Show seconds in a unit that suits them."""
    if value >= 1000:
        return f"{value:,.0f} s"
    return f"{value:,.3g} s" if value >= 1 else f"{1e3 * value:,.3g} ms"


def _hours(value: float) -> str:
    if value >= 1:
        return f"{value:,.3g} h"
    return f"{60 * value:,.3g} min" if value >= 1 / 60 else show_seconds(3600 * value)
