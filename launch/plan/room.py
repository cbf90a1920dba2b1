"""Whether dies and nodes have room for a run, and the nearest plan that fits where they have not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hydrazero.launch.job.site_file import Site
from hydrazero.launch.plan.node_memory import NodeMemory
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.cost.run_memory import scaled

USABLE = 0.9
"""Share of memory that a run may be planned to take (estimate). On a die the rest is for the context of CUDA or ROCm,
kernels, the buffers of the library that sums between ranks, and holes between tensors; on a node for the system, for
files that it keeps in memory, and for what compiles."""


def room_of_die(site: Site) -> float:
    """Bytes that a run may take on a die."""
    return USABLE * site.die.memory.value


def room_of_node(site: Site) -> float:
    """Bytes that a run may take of a node's main memory."""
    return USABLE * site.nodes.memory.value


def check_die(
    site: Site, memory: Sequence[dict[str, Any]], batch: BatchShape, micro_batches: int, structure: float
) -> None:
    """Raise ConfigError, with the nearest plan that fits, if a die cannot hold the run.

    `memory` has a row for each ZeRO stage and precision, `structure` is the mean number of atoms in structures of the
    task with the largest.
    """
    (own,) = (row for row in memory if row["own"])
    if own["fits"]:
        return
    room = room_of_die(site)
    taken = (
        f"a die of {site.name} has {_gb(site.die.memory.value)}, of which a run may take {_gb(room)}, and this one "
        f"takes {_gb(own['total'])}"
    )
    for row in memory:
        if row["precision"] == own["precision"] and row["stage"] > own["stage"] and row["fits"]:
            raise ConfigError(f"{taken}; under ZeRO {row['stage']} it takes {_gb(row['total'])} and fits.")
    states = own["total"] - own["activations"]
    fitting = scaled(batch, max((room - states) / own["activations"], 0.0))
    if fitting.atoms < structure:
        raise ConfigError(
            f"{taken}, {_gb(states)} of it whatever the batch, which leaves no room for a structure of {structure:.0f} "
            "atoms: take a smaller model."
        )
    times = micro_batches * -(-batch.atoms // fitting.atoms)
    raise ConfigError(
        f"{taken}; a batch of structures = {fitting.structures}, atoms = {fitting.atoms}, slots = {fitting.slots}, "
        f"edges = {fitting.edges} fits ([batch]), with {times} of them a step (deepspeed.gradient_accumulation_steps)."
    )


def check_node(site: Site, ranks: int, workers: int, taken_by: Callable[[int, int], NodeMemory]) -> None:
    """Raise ConfigError, with the nearest plan that fits, if a node's main memory cannot hold its ranks.

    `taken_by` says what so many ranks of a node take with so many workers each.
    """
    room, taken = room_of_node(site), taken_by(ranks, workers).total
    if taken <= room:
        return
    said = (
        f"a node of {site.name} has {_gb(site.nodes.memory.value)} of main memory, of which a run may take "
        f"{_gb(room)}, and {ranks} ranks with {workers} workers each take {_gb(taken)}"
    )
    fewer = [(f"data.workers = {count}", taken_by(ranks, count)) for count in range(workers - 1, 0, -1)]
    fewer += [(f"--ranks-per-node {count}", taken_by(count, workers)) for count in range(ranks - 1, 0, -1)]
    for change, memory in fewer:
        if memory.total <= room:
            raise ConfigError(f"{said}; with {change} they take {_gb(memory.total)} and fit.")
    raise ConfigError(f"{said}, and a single rank with as many does not fit either: take a smaller model or batch.")


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
