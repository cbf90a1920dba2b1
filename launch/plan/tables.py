"""The tables that `hydrazero plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

SHOWN_STATES = ("weights", "gradients", "optimizer", "average", "buffers")
SHOWN_PARTS = (*SHOWN_STATES, "activations", "stream")
IN_MAIN_MEMORY = ("processes", "stream", "manifests", "offloaded", "dies")
LEFT = ("precision", "operation", "data", "algorithm", "", "value", "source")
"""Headings of columns that are aligned to the left."""


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right", no_wrap=heading != "source")
    return table


def tables(plan: dict[str, Any]) -> list[Table]:
    """Return all tables of a plan."""
    makers = (summary, memory, main_memory, traffic, stages, scaling, numbers, algorithms)
    return [make(plan) for make in makers]


def _jobs(number: float) -> str:
    return "1 job" if number == 1 else f"{number:,.0f} jobs"


def summary(plan: dict[str, Any]) -> Table:
    """Return the table of the run, its step, its files and its epoch."""
    table = _table(f"{plan['run']} on {plan['site']['name']}", ["", "value"])
    table.show_header = False
    for name, value in (*_step_rows(plan), *_file_rows(plan["files"]), *_epoch_rows(plan["epoch"], plan["files"])):
        table.add_row(name, value)
    return table


def _step_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on the size of the run, its memory, and one step."""
    site, batch, step = (plan[key] for key in ("site", "batch", "step"))
    model, pace, by = plan["model"], plan["pace"], plan["deepspeed"]
    own = next(row for row in plan["memory"] if row["own"])
    batches = "1 batch" if batch["accumulation"] == 1 else f"{batch['accumulation']} batches"
    loading = "" if pace["atoms_of_worker"] is None else f"; meanwhile, data loading takes {show_seconds(step['data'])}"
    return [
        ("ranks", f"{site['ranks']:,} on {site['nodes']:,} nodes"),
        (
            "model",
            f"{model['encoder']}, {model['encoder_parameters']:,} parameters in the encoder, {model['heads']:,} in the "
            "heads",
        ),
        ("DeepSpeed", f"ZeRO {by['stage']}, {by['precision']}{', compiled' if by['compiled'] else ''}"),
        (
            "batch",
            f"{batch['structures_filled']} structures of {batch['atoms_of_structure']:.0f} atoms; {batches} per rank "
            f"and step: {batch['global_batch']:,} structures per step",
        ),
        ("device memory", _of(own["total"], plan["memory_of_die"])),
        ("node memory", _of(plan["memory_of_node"]["total"], plan["memory_of_node"])),
        (
            "one step",
            f"{show_seconds(step['seconds'])}: {show_seconds(step['compute'])} compute, "
            f"{show_seconds(step['optimizer'])} optimizer, {show_seconds(step['communication'])} communication"
            f"{loading}",
        ),
        ("speed", f"{pace['share']:.0%} of the roofline ({pace['source']})"),
    ]


def _file_rows(files: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on shards, copies of them, and the load on the file system."""
    return [
        (
            "shards",
            f"{files['shards']:,} files, {show_bytes(files['bytes'])}; {files['shards_per_rank']:.2g} per rank; every "
            f"byte is read {files['amplification']:.2g} times per epoch",
        ),
        (
            "files opened",
            f"{files['opens_at_start']:,.0f} at the start ({show_seconds(files['seconds_of_opens_at_start'])}), then "
            f"{files['opens_per_s']:,.0f} per second, {_share(files['opens_share'])} the file system's limit",
        ),
        (
            "copies",
            f"to {files['node_local']} on each node in {show_seconds(files['seconds_of_copying'])}; shards are then "
            "opened and read there"
            if files["node_local"]
            else "none, since nodes have no disks of their own",
        ),
        (
            "reading",
            f"{show_bytes(files['bandwidth'])}/s by all ranks, {_share(files['bandwidth_share'])} the file system's "
            "bandwidth",
        ),
    ]


def _epoch_rows(epoch: dict[str, Any], files: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on one epoch and on the complete run."""
    jobs, run_jobs = _jobs(epoch["jobs"]), _jobs(epoch["run_jobs"])
    copies = " with copying" if files["seconds_of_copying"] else ""
    return [
        (
            "one epoch",
            f"{epoch['structures']:,} structures, {epoch['steps']:,} steps, {_hours(epoch['hours'])}, "
            f"{epoch['node_hours']:,.3g} node-hours, {jobs} of {epoch['hours_of_job']:,g} h",
        ),
        (
            "the run",
            f"{epoch['run_epochs']:.2g} epochs, {_hours(epoch['run_hours'])}; {run_jobs}{copies}: "
            f"{_hours(epoch['run_hours_with_copies'])}, {epoch['run_node_hours']:,.0f} node-hours",
        ),
    ]


def memory(plan: dict[str, Any]) -> Table:
    """Return the table of a device's memory, with a row for each precision and ZeRO stage."""
    has = plan["memory_of_die"]
    whole, usable = show_bytes(has["bytes"]), show_bytes(has["room"])
    title = f"memory per rank in MB ({usable} of a device's {whole} may be used)"
    table = _table(title, ["precision", "ZeRO", *SHOWN_PARTS, "of these\non the host", "on the\ndevice"])
    for row in plan["memory"]:
        parts = [f"{row[part] / 1e6:,.1f}" for part in (*SHOWN_PARTS, "host")]
        total = f"{row['total'] / 1e6:,.0f}" + ("" if row["fits"] else " (too much)")
        table.add_row(row["precision"], str(row["stage"]), *parts, total, style="bold" if row["own"] else None)
    return table


def main_memory(plan: dict[str, Any]) -> Table:
    """Return the table of a node's main memory."""
    has = plan["memory_of_node"]
    whole, usable = show_bytes(has["bytes"]), show_bytes(has["room"])
    title = f"main memory per node in GB ({usable} of {whole} may be used)"
    headings = ["processes", "batches", "manifests", "offloaded", "steps on\nCPU cores", "total"]
    table = _table(title, headings)
    table.add_row(*(f"{has[part] / 1e9:,.3g}" for part in (*IN_MAIN_MEMORY, "total")))
    return table


def traffic(plan: dict[str, Any]) -> Table:
    """Return the table of the collective operations of a step."""
    headings = ["operation", "data", "times", "bytes", "within\nthe node", "over the\nnetwork", "ms", "algorithm"]
    table = _table("communication per rank and step", headings)
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
    """Return the table of a step under each ZeRO stage."""
    headings = ["ZeRO", "compute, ms", "optimizer, ms", "communication, ms", "step, ms", "if fully\noverlapped, ms"]
    table = _table("one step under each ZeRO stage", headings)
    for row in plan["stages"]:
        values = [row[key] for key in ("compute", "optimizer", "communication", "seconds")]
        values.append(max(row["compute"] + row["optimizer"], row["communication"], row["data"]))
        stage = f"{row['stage']}" + ("" if row["fits"] else " (too much memory)")
        table.add_row(stage, *map(_ms, values), style="bold" if row["own"] else None)
    return table


def scaling(plan: dict[str, Any]) -> Table:
    """Return the table of weak and strong scaling."""
    batches = plan["scaling"]["batches"]
    headings = ["ranks", "weak: step", "efficiency", "strong: step", "efficiency"]
    table = _table(f"scaling: weak with the same batches per rank, strong with {batches:,} batches per step", headings)
    for weak, strong in zip(plan["scaling"]["weak"], plan["scaling"]["strong"], strict=True):
        cells = [text for row in (weak, strong) for text in (show_seconds(row["seconds"]), f"{row['efficiency']:.1%}")]
        own = weak["ranks"] == plan["site"]["ranks"]
        table.add_row(f"{weak['ranks']:,}", *cells, style="bold" if own else None)
    return table


def numbers(plan: dict[str, Any]) -> Table:
    """Return the table of the site's numbers with their sources."""
    table = _table(f"{plan['site']['name']}: numbers and their sources", ["", "value", "source"])
    for name, row in plan["sources"].items():
        table.add_row(name, f"{row['value']:.4g}", row["source"])
    return table


def algorithms(plan: dict[str, Any]) -> Table:
    """Return the table of the algorithms of the site's communication library, with the sources."""
    site, collectives = plan["site"]["name"], plan["collectives"]
    headings = [
        "algorithm",
        "start, µs",
        "step within\na node, µs",
        "step between\nnodes, µs",
        "bandwidth\nreached",
        "source",
    ]
    table = _table(f"{site}: algorithms of {collectives['library']}", headings)
    for way in collectives["ways"]:
        name = ", ".join(filter(None, (way["algorithm"].replace("_", " "), way["protocol"])))
        times = [f"{1e6 * way[key]:.3g}" for key in ("start", "node_step", "network_step")]
        table.add_row(name, *times, f"{way['bandwidth_share']:.0%}", way["source"])
    return table


def _of(taken: float, memory: dict[str, float]) -> str:
    usable, whole = show_bytes(memory["room"]), show_bytes(memory["bytes"])
    return f"{show_bytes(taken)} of {whole}, of which {usable} may be used"


def _share(value: float) -> str:
    return f"{value:.2g} times" if value > 1 else f"{value:.1%} of"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds >= 1e-6 or not seconds else "< 0.001"


def show_bytes(count: float) -> str:
    """Return a number of bytes as text in a suitable unit."""
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count:,.3g} B"


def show_seconds(value: float) -> str:
    """Return a duration as text in a suitable unit."""
    if value >= 1000:
        return f"{value:,.0f} s"
    return f"{value:,.3g} s" if value >= 1 else f"{1e3 * value:,.3g} ms"


def _hours(value: float) -> str:
    if value >= 1:
        return f"{value:,.3g} h"
    return f"{60 * value:,.3g} min" if value >= 1 / 60 else show_seconds(3600 * value)
