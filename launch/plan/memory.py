"""The memory that a planned run takes on devices and nodes, and the nearest plan that fits where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hydrazero.launch.job.site_file import Site
from hydrazero.launch.plan.compute import PEAKS
from hydrazero.launch.plan.data import TaskData
from hydrazero.launch.plan.request import PlanRequest
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.config.precision import PRECISIONS, Precision
from hydrazero.trainer.cost.device_memory import DeviceMemory, device_memory
from hydrazero.trainer.cost.run_memory import scaled
from hydrazero.trainer.cost.step_cost import StepCost
from hydrazero.trainer.cost.step_memory import PEAK_OVER_KEPT
from hydrazero.trainer.cost.traffic import Run

USABLE = 0.9
"""Fraction of memory that a plan may use (estimate). On a device, the rest is for the context of CUDA or ROCm, kernels,
the buffers of the communication library and gaps between tensors; on a node, it is for the operating system, its file
cache and compilers."""
PROCESS = 0.5e9
"""Bytes of a rank's process and of each of its workers: Python and its modules (measured: 0.58 and 0.46 GB). Workers
are forked and share most of this memory at first, but less and less, since counting references writes to it."""
GPU_PROCESS = 1.0e9
"""Bytes that CUDA or ROCm keep in a rank's process (estimate)."""
BYTES_OF_BLOCK = 155.0
"""Bytes of one block of a manifest in a process: 230 MB for 1.49 million blocks (docs/results/storm.md)."""
PAGE_LOCKED = 2.0
"""Largest factor by which offloaded states grow, since torch rounds page-locked memory up to a power of two."""


@dataclass(frozen=True, kw_only=True)
class NodeMemory:
    """Main memory that all ranks of a node take, in bytes."""

    processes: float
    """Processes of ranks and workers."""
    stream: float
    """Decoded blocks and prepared batches; they are part of `dies` if ranks compute on CPU cores."""
    manifests: float
    """Manifests, which every process holds."""
    offloaded: float
    """Optimizer states that are offloaded to the host."""
    dies: float
    """Everything that a step takes if ranks compute on CPU cores; the name is that of the key in plan.json."""

    @property
    def total(self) -> float:
        """Sum of all parts, without the kernel's file cache, which the kernel gives up when memory is needed."""
        return sum(asdict(self).values())


def device_limit(site: Site) -> float:
    """Return the bytes that a plan may use on a device."""
    return USABLE * site.die.memory.value


def node_limit(site: Site) -> float:
    """Return the bytes that a plan may use of a node's main memory."""
    return USABLE * site.nodes.memory.value


def memory_of_devices(
    run: Run, per_atom: StepCost, request: PlanRequest, largest: float
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row with the memory of a device for each ZeRO stage and precision, and the memory that the device has.

    `largest` is the mean number of atoms of a structure in the task that has the largest structures. Raise ConfigError,
    with the nearest plan that fits, if the run itself does not fit.
    """
    rows = memory_table(run, per_atom, request)
    check_device(request.site, rows, request.settings.batch, run.micro_batches, largest)
    return rows, {"bytes": request.site.die.memory.value, "room": device_limit(request.site)}


def memory_table(run: Run, per_atom: StepCost, request: PlanRequest) -> list[dict[str, Any]]:
    """Return the memory of a device under each ZeRO stage, in every precision that the site's devices support."""
    rows = []
    for precision in (item for item in PRECISIONS if PEAKS.get(item.key, "float32") in request.site.die.flops):
        for stage in precision.stages:
            other = in_precision(run, precision).with_stage(stage)
            held = memory_of_rank(other, per_atom, request, request.settings.workers)
            rows.append(
                {
                    "stage": stage,
                    "precision": precision.label,
                    "own": stage == run.stage and precision.key == run.precision.key,
                    **asdict(held),
                    "total": held.total,
                    "fits": held.total <= device_limit(request.site),
                }
            )
    return rows


def in_precision(run: Run, precision: Precision) -> Run:
    """Return the same run in another precision."""
    kept = {key: value for key, value in run.ds_config.items() if key not in {item.key for item in PRECISIONS}}
    tables = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    if precision.key:
        kept[precision.key] = tables.get(precision.key, {"enabled": True})
    return replace(run, ds_config=kept).with_stage(precision.stages[0])


def memory_of_rank(run: Run, per_atom: StepCost, request: PlanRequest, workers: int) -> DeviceMemory:
    """Return the memory of a rank's device with a full batch and `workers` data-loading processes."""
    number, shape = {"fp64": 2.0}.get(run.precision.key, 1.0), request.settings.batch
    kept = per_atom.bytes_per_atom * shape.atoms + per_atom.bytes_per_slot * shape.slots
    return device_memory(
        run,
        request.ranks,
        activations=PEAK_OVER_KEPT * kept * number,
        gpu=request.site.die.kind == "gpu",
        workers=workers,
    )


def check_device(
    site: Site, memory: Sequence[dict[str, Any]], batch: BatchShape, micro_batches: int, largest: float
) -> None:
    """Raise ConfigError, with the nearest plan that fits, if the run does not fit on a device.

    `memory` has a row for each ZeRO stage and precision; `largest` is the mean number of atoms of a structure in the
    task that has the largest structures.
    """
    (own,) = (row for row in memory if row["own"])
    if own["fits"]:
        return
    limit = device_limit(site)
    taken = (
        f"a device of {site.name} has {_gb(site.die.memory.value)}, of which a run may use {_gb(limit)}, but this run "
        f"needs {_gb(own['total'])}"
    )
    for row in memory:
        if row["precision"] == own["precision"] and row["stage"] > own["stage"] and row["fits"]:
            raise ConfigError(f"{taken}; with ZeRO {row['stage']} it needs {_gb(row['total'])} and fits.")
    states = own["total"] - own["activations"]
    fitting = scaled(batch, max((limit - states) / own["activations"], 0.0))
    if fitting.atoms < largest:
        raise ConfigError(
            f"{taken}, of which {_gb(states)} do not depend on the batch; what is left does not hold a structure of "
            f"{largest:.0f} atoms: use a smaller model."
        )
    times = micro_batches * -(-batch.atoms // fitting.atoms)
    raise ConfigError(
        f"{taken}; a batch of structures = {fitting.structures}, atoms = {fitting.atoms}, slots = {fitting.slots}, "
        f"edges = {fitting.edges} fits ([batch]), with {times} batches per step "
        "(deepspeed.gradient_accumulation_steps)."
    )


def memory_of_node(run: Run, per_atom: StepCost, request: PlanRequest, data: Sequence[TaskData]) -> dict[str, float]:
    """Return the main memory that a node needs; raise ConfigError, with the nearest plan that fits, if it has less."""

    def needed(ranks: int, workers: int) -> NodeMemory:
        held = memory_of_rank(run, per_atom, replace(request, ranks_per_node=ranks), workers)
        return node_memory(held, data, ranks=ranks, workers=workers, gpu=request.site.die.kind == "gpu")

    workers = request.settings.workers
    check_node(request.site, request.ranks_per_node, workers, needed)
    memory = needed(request.ranks_per_node, workers)
    limits = {"bytes": request.site.nodes.memory.value, "room": node_limit(request.site)}
    return {**asdict(memory), "total": memory.total, **limits}


def node_memory(held: DeviceMemory, data: Sequence[TaskData], *, ranks: int, workers: int, gpu: bool) -> NodeMemory:
    """Return the main memory of a node with `ranks` ranks, each of which takes `held`."""
    processes = 1 + workers
    return NodeMemory(
        processes=ranks * (processes * PROCESS + (GPU_PROCESS if gpu else 0.0)),
        stream=ranks * held.stream if gpu else 0.0,
        manifests=ranks * processes * BYTES_OF_BLOCK * sum(task.blocks for task in data),
        offloaded=ranks * PAGE_LOCKED * (held.host - held.stream) if gpu else 0.0,
        dies=0.0 if gpu else ranks * held.total,
    )


def check_node(site: Site, ranks: int, workers: int, needed: Callable[[int, int], NodeMemory]) -> None:
    """Raise ConfigError, with the nearest plan that fits, if a node's main memory does not hold its ranks.

    `needed` returns the memory of a node for a number of ranks and a number of workers per rank.
    """
    limit, taken = node_limit(site), needed(ranks, workers).total
    if taken <= limit:
        return
    said = (
        f"a node of {site.name} has {_gb(site.nodes.memory.value)} of main memory, of which a run may use "
        f"{_gb(limit)}, but {ranks} ranks with {workers} workers each need {_gb(taken)}"
    )
    fewer = [(f"data.workers = {count}", needed(ranks, count)) for count in range(workers - 1, 0, -1)]
    fewer += [(f"--ranks-per-node {count}", needed(count, workers)) for count in range(ranks - 1, 0, -1)]
    for change, memory in fewer:
        if memory.total <= limit:
            raise ConfigError(f"{said}; with {change} they need {_gb(memory.total)} and fit.")
    raise ConfigError(f"{said}, and a single rank with as many does not fit either: use a smaller model or batch.")


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
