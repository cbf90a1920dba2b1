"""The plan of a run on a site: memory, traffic, time of a step, scaling, files, an epoch; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hydrazero.launch.plan.collectives import check_ways
from hydrazero.launch.plan.compute import pace_of
from hydrazero.launch.plan.data import TaskData, mean_atoms, planned_data
from hydrazero.launch.plan.head_groups import placements
from hydrazero.launch.plan.memory import memory_of_dies, memory_of_node
from hydrazero.launch.plan.reading import epoch, files, sources
from hydrazero.launch.plan.request import Asked, accumulation, check_asked, check_batch, check_deepspeed, structures_of
from hydrazero.launch.plan.scaling import Stepper
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.precision import precision_of
from hydrazero.trainer.cost.step_cost import ModelSize, StepCost, planned_size, step_cost
from hydrazero.trainer.cost.step_memory import memory_at_hand
from hydrazero.trainer.cost.traffic import Run

UNCOMPILED_STAGE = 3
"""Stage of ZeRO whose steps run as they are, whatever train.compile says."""

MEASURED = 16.0
"""Bytes of a parameter while a small step is counted: weight, gradient, and what is kept of both."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What all parts of a plan are made of."""

    data: list[TaskData]
    atoms: float
    """Of a structure, mean."""
    per_batch: int
    """Structures in a batch."""
    run: Run
    """With the batches of a rank in a step that the plan asks for."""
    one_head: StepCost
    """Of a step whose atoms go through one head."""
    stepper: Stepper
    compiled: bool


def basis_of(asked: Asked) -> Basis:
    """Return what a plan is made of; raises ConfigError for what the site lacks and what does not divide."""
    check_ways(asked.site)
    check_asked(asked)
    config, site = asked.config, asked.site
    ds_config, data = deepspeed_config(config.deepspeed, config.train.steps), planned_data(config.tasks, config.plan)
    check_deepspeed(ds_config)
    check_batch(config.batch, data)
    settings, tasks = config.model.settings(), len(config.tasks)
    run = Run(
        size=planned_size(settings, [bool(task.charge_spin) for task in config.tasks]),
        ds_config=ds_config,
        tasks=tasks,
        quantities=3,
        features=config.model.features,
        balance_every=config.balance.every if tasks > 1 else 0,
        average=bool(config.train.average),
    )
    check_measurable(run.size)
    atoms = mean_atoms(data, config.data.temperature, config.shares)
    per_batch = structures_of(config.batch, atoms)
    run = run.with_micro_batches(accumulation(asked, per_batch, run.micro_batches))
    compiled = config.train.compile and run.stage != UNCOMPILED_STAGE
    stepper = Stepper(
        run=run,
        site=site.model_copy(update={"nodes": site.nodes.model_copy(update={"dies": asked.ranks_per_node})}),
        pace=pace_of(site.die, precision_of(ds_config), asked.bench, compiled=compiled),
        # The kernels for CPUs need no blocks of one task, and no padding.
        cost=step_cost(settings, tasks if site.die.kind == "gpu" else 1),
        shape=config.batch,
        workers=config.data.workers,
    )
    return Basis(
        data=data,
        atoms=atoms,
        per_batch=per_batch,
        run=run,
        one_head=step_cost(settings, 1),
        stepper=stepper,
        compiled=compiled,
    )


def check_measurable(size: ModelSize) -> None:
    """Raise ConfigError if this host has no room for the small step by which a model's costs are counted."""
    needed, free = MEASURED * size.parameters, memory_at_hand(1)
    if needed > free:
        raise ConfigError(
            f"the model has {size.parameters:,} parameters, and counting the costs of a small step of it takes "
            f"{needed / 1e9:.3g} GB here, of which {free / 1e9:.3g} GB are free; take a smaller model or a larger host."
        )


def plan(asked: Asked) -> dict[str, Any]:
    """Return the plan as plain types; raises ConfigError for what the site lacks and what does not divide or fit."""
    basis, config, site = basis_of(asked), asked.config, asked.site
    run, stepper, micro = basis.run, basis.stepper, basis.run.micro_batches
    memory, of_die = memory_of_dies(run, stepper.cost, asked, max(task.atoms for task in basis.data))
    of_node = memory_of_node(run, stepper.cost, asked, basis.data)
    time, global_batch = stepper.time(asked.ranks, micro), asked.ranks * basis.per_batch * micro
    read = files(asked, basis.data, basis.per_batch * micro / time.seconds)
    return {
        "run": config.run.out,
        "site": {"name": site.name, "about": site.about, "nodes": asked.nodes, "ranks": asked.ranks},
        "deepspeed": {"stage": run.stage, "precision": run.precision.label, "compiled": basis.compiled},
        "model": {
            "encoder": config.model.encoder,
            "features": config.model.features,
            "encoder_parameters": run.size.encoder,
            "heads": run.size.heads,
        },
        "batch": {
            **config.batch.model_dump(),
            "structures_filled": basis.per_batch,
            "atoms_of_structure": basis.atoms,
            "accumulation": micro,
            "global_batch": global_batch,
        },
        "memory": memory,
        "memory_of_die": of_die,
        "memory_of_node": of_node,
        "messages": [{**asdict(message), **asdict(one)} for message, one in stepper.sent(asked.ranks, micro)],
        "step": {**asdict(time), "seconds": time.seconds, "overlapped": time.overlapped},
        "pace": {
            **asdict(stepper.pace),
            "seconds_of_arithmetic_and_memory": stepper.pace.parts(stepper.cost, config.batch),
        },
        "stages": stages(stepper, memory, asked, micro),
        "scaling": stepper.scaling(site.nodes.most * asked.ranks_per_node, asked.ranks, micro),
        "heads": {
            name: {**asdict(each), "seconds": each.seconds}
            for name, each in placements(stepper, basis.one_head, asked.ranks, micro).items()
        },
        "files": read,
        "epoch": epoch(asked, basis.data, global_batch, time.seconds, read["seconds_of_copying"]),
        "tasks": [{**asdict(task), "bytes": task.bytes, "shards": task.shards} for task in basis.data],
        "collectives": site.collectives.model_dump(),
        "sources": sources(site),
    }


def stages(
    stepper: Stepper, memory: Sequence[dict[str, Any]], asked: Asked, micro_batches: int
) -> list[dict[str, Any]]:
    """Return the step under each ZeRO stage in the run's precision."""
    paces = {
        compiled: pace_of(asked.site.die, stepper.run.precision, asked.bench, compiled=compiled)
        for compiled in {False, asked.config.train.compile}
    }
    rows = []
    for row in (row for row in memory if row["precision"] == stepper.run.precision.label):
        pace = paces[asked.config.train.compile and row["stage"] != UNCOMPILED_STAGE]
        run = stepper.run.with_stage(row["stage"])
        time = replace(stepper, run=run, pace=pace).time(asked.ranks, micro_batches)
        kept = {key: row[key] for key in ("stage", "fits", "own")}
        rows.append({**kept, **asdict(time), "seconds": time.seconds})
    return rows
