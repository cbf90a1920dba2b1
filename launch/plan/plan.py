"""The plan of a run on a site: memory, traffic, time per step, scaling, files, an epoch; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hydrazero.launch.plan.collectives import check_algorithms
from hydrazero.launch.plan.compute import pace_of
from hydrazero.launch.plan.data import TaskData, mean_atoms, planned_data
from hydrazero.launch.plan.epoch import epoch_costs, file_access, sources
from hydrazero.launch.plan.memory import memory_of_devices, memory_of_node
from hydrazero.launch.plan.request import (
    PlanRequest,
    accumulation,
    check_batch,
    check_deepspeed,
    check_request,
    structures_per_batch,
)
from hydrazero.launch.plan.scaling import Stepper
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.cost.step_cost import ModelSize, planned_size, step_cost
from hydrazero.trainer.cost.step_memory import memory_at_hand
from hydrazero.trainer.cost.traffic import Run

UNCOMPILED_STAGE = 3
"""ZeRO stage whose steps are never compiled, whatever train.compile says."""

MEASURED = 16.0
"""Bytes per parameter while a small step is measured: weight, gradient, and what is kept of both."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What all parts of a plan are calculated from."""

    data: list[TaskData]
    atoms: float
    """Mean number of atoms of a structure."""
    per_batch: int
    """Number of structures in a batch."""
    run: Run
    """The run with the number of batches per rank and step that the plan asks for."""
    stepper: Stepper
    compiled: bool


def basis_of(request: PlanRequest) -> Basis:
    """Return what a plan is calculated from; raise ConfigError if the site or the run file lacks something."""
    check_algorithms(request.site)
    check_request(request)
    settings, site = request.settings, request.site
    data = planned_data(settings.tasks, settings.assumed)
    check_deepspeed(settings.ds_config)
    check_batch(settings.batch, data)
    model, tasks = settings.model.settings(), len(settings.tasks)
    run = Run(
        size=planned_size(model, [bool(task.charge_spin) for task in settings.tasks]),
        ds_config=settings.ds_config,
        tasks=tasks,
        quantities=3,
        features=settings.model.features,
        balance_every=settings.balance_every if tasks > 1 else 0,
        average=settings.average,
    )
    check_measurable(run.size)
    atoms = mean_atoms(data, settings.temperature, settings.shares)
    per_batch = structures_per_batch(settings.batch, atoms)
    run = run.with_micro_batches(accumulation(request, per_batch, run.micro_batches))
    compiled = settings.compiled and run.stage != UNCOMPILED_STAGE
    stepper = Stepper(
        run=run,
        site=site.model_copy(update={"nodes": site.nodes.model_copy(update={"dies": request.ranks_per_node})}),
        pace=pace_of(site.die, run.precision, request.bench, compiled=compiled),
        # The CPU kernels need neither blocks of one task nor padding.
        cost=step_cost(model, tasks if site.die.kind == "gpu" else 1),
        shape=settings.batch,
        workers=settings.workers,
    )
    return Basis(data=data, atoms=atoms, per_batch=per_batch, run=run, stepper=stepper, compiled=compiled)


def check_measurable(size: ModelSize) -> None:
    """Raise ConfigError if this host lacks the memory for the small step with which a model's costs are measured."""
    needed, free = MEASURED * size.parameters, memory_at_hand(1)
    if needed > free:
        raise ConfigError(
            f"the model has {size.parameters:,} parameters; measuring the costs of a small step of it takes "
            f"{needed / 1e9:.3g} GB on this host, but {free / 1e9:.3g} GB are free; use a smaller model or a larger "
            "host."
        )


def plan(request: PlanRequest) -> dict[str, Any]:
    """Return the plan as plain types; raise ConfigError if something is missing, does not divide or does not fit."""
    basis, settings, site = basis_of(request), request.settings, request.site
    run, stepper, micro = basis.run, basis.stepper, basis.run.micro_batches
    memory, of_device = memory_of_devices(run, stepper.cost, request, max(task.atoms for task in basis.data))
    of_node = memory_of_node(run, stepper.cost, request, basis.data)
    time, global_batch = stepper.time(request.ranks, micro), request.ranks * basis.per_batch * micro
    read = file_access(request, basis.data, basis.per_batch * micro / time.seconds)
    return {
        "run": settings.out,
        "site": {"name": site.name, "about": site.about, "nodes": request.nodes, "ranks": request.ranks},
        "deepspeed": {"stage": run.stage, "precision": run.precision.label, "compiled": basis.compiled},
        "model": {
            "encoder": settings.model.encoder,
            "features": settings.model.features,
            "encoder_parameters": run.size.encoder,
            "heads": run.size.heads,
        },
        "batch": {
            **settings.batch.model_dump(),
            "structures_filled": basis.per_batch,
            "atoms_of_structure": basis.atoms,
            "accumulation": micro,
            "global_batch": global_batch,
        },
        "memory": memory,
        "memory_of_die": of_device,
        "memory_of_node": of_node,
        "messages": [{**asdict(message), **asdict(one)} for message, one in stepper.collectives(request.ranks, micro)],
        "step": {**asdict(time), "seconds": time.seconds, "overlapped": time.overlapped},
        "pace": {
            **asdict(stepper.pace),
            "seconds_of_arithmetic_and_memory": stepper.pace.parts(stepper.cost, settings.batch),
        },
        "stages": stages(stepper, memory, request, micro),
        "scaling": stepper.scaling(site.nodes.most * request.ranks_per_node, request.ranks, micro),
        "files": read,
        "epoch": epoch_costs(request, basis.data, global_batch, time.seconds, read["seconds_of_copying"]),
        "tasks": [{**asdict(task), "bytes": task.bytes, "shards": task.shards} for task in basis.data],
        "collectives": site.collectives.model_dump(),
        "sources": sources(site),
    }


def stages(
    stepper: Stepper, memory: Sequence[dict[str, Any]], request: PlanRequest, micro_batches: int
) -> list[dict[str, Any]]:
    """Return the time of a step under each ZeRO stage in the run's precision."""
    paces = {
        compiled: pace_of(request.site.die, stepper.run.precision, request.bench, compiled=compiled)
        for compiled in {False, request.settings.compiled}
    }
    rows = []
    for row in (row for row in memory if row["precision"] == stepper.run.precision.label):
        pace = paces[request.settings.compiled and row["stage"] != UNCOMPILED_STAGE]
        run = stepper.run.with_stage(row["stage"])
        time = replace(stepper, run=run, pace=pace).time(request.ranks, micro_batches)
        kept = {key: row[key] for key in ("stage", "fits", "own")}
        rows.append({**kept, **asdict(time), "seconds": time.seconds})
    return rows
