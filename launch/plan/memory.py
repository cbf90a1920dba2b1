"""What dies and nodes hold of a planned run, under each ZeRO stage and precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from hydrazero.launch.plan.compute import PEAKS
from hydrazero.launch.plan.data import TaskData
from hydrazero.launch.plan.node_memory import NodeMemory, node_memory
from hydrazero.launch.plan.request import Asked
from hydrazero.launch.plan.room import check_die, check_node, room_of_die, room_of_node
from hydrazero.trainer.config.precision import PRECISIONS, Precision
from hydrazero.trainer.cost.device_memory import DieMemory, die_memory
from hydrazero.trainer.cost.step_cost import StepCost
from hydrazero.trainer.cost.step_memory import PEAK_OVER_KEPT
from hydrazero.trainer.cost.traffic import Run


def memory_table(run: Run, per_atom: StepCost, asked: Asked) -> list[dict[str, Any]]:
    """Return what a die holds under each ZeRO stage, in the run's precision and in those that the site's dies have."""
    rows = []
    for precision in (item for item in PRECISIONS if PEAKS.get(item.key, "float32") in asked.site.die.flops):
        for stage in precision.stages:
            other = in_precision(run, precision).with_stage(stage)
            held = held_by(other, per_atom, asked, asked.config.data.workers)
            rows.append(
                {
                    "stage": stage,
                    "precision": precision.label,
                    "own": stage == run.stage and precision.key == run.precision.key,
                    **asdict(held),
                    "total": held.total,
                    "fits": held.total <= room_of_die(asked.site),
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


def held_by(run: Run, per_atom: StepCost, asked: Asked, workers: int) -> DieMemory:
    """Return what a die holds with a full batch, and with so many workers."""
    number, shape = {"fp64": 2.0}.get(run.precision.key, 1.0), asked.config.batch
    kept = per_atom.bytes_per_atom * shape.atoms + per_atom.bytes_per_slot * shape.slots
    return die_memory(
        run,
        asked.ranks,
        activations=PEAK_OVER_KEPT * kept * number,
        gpu=asked.site.die.kind == "gpu",
        workers=workers,
    )


def memory_of_node(run: Run, per_atom: StepCost, asked: Asked, data: Sequence[TaskData]) -> dict[str, float]:
    """Return what a node's main memory holds; raises ConfigError, with the nearest plan that fits, if it cannot."""

    def taken_by(ranks: int, workers: int) -> NodeMemory:
        held = held_by(run, per_atom, replace(asked, ranks_per_node=ranks), workers)
        return node_memory(held, data, ranks=ranks, workers=workers, gpu=asked.site.die.kind == "gpu")

    workers = asked.config.data.workers
    check_node(asked.site, asked.ranks_per_node, workers, taken_by)
    taken = taken_by(asked.ranks_per_node, workers)
    room = {"bytes": asked.site.nodes.memory.value, "room": room_of_node(asked.site)}
    return {**asdict(taken), "total": taken.total, **room}


def memory_of_dies(
    run: Run, per_atom: StepCost, asked: Asked, structure: float
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row of what a die holds for each ZeRO stage and precision, and the memory that it has.

    `structure` is the mean number of atoms in structures of the task with the largest. Raises ConfigError, with the
    nearest plan that fits, if the run's own row does not.
    """
    rows = memory_table(run, per_atom, asked)
    check_die(asked.site, rows, asked.config.batch, run.micro_batches, structure)
    return rows, {"bytes": asked.site.die.memory.value, "room": room_of_die(asked.site)}
