"""The plan of a run on a site: memory, traffic, time of a step, scaling, files, an epoch; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydrazero.launch.collectives import check_ways
from hydrazero.launch.compute import PEAKS, pace_of
from hydrazero.launch.die_memory import DieMemory, die_memory
from hydrazero.launch.head_groups import placements
from hydrazero.launch.job import longest_hours
from hydrazero.launch.planned_data import TaskData, mean_atoms, planned_data, reading
from hydrazero.launch.scaling import RANKS, Stepper
from hydrazero.launch.site_file import Site
from hydrazero.launch.traffic import Run
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graph import BatchShape
from hydrazero.trainer.batch_memory import PEAK_OVER_KEPT
from hydrazero.trainer.config import RunConfig
from hydrazero.trainer.engine_config import deepspeed_config
from hydrazero.trainer.precision import PRECISIONS, Precision, precision_of
from hydrazero.trainer.run_memory import scaled
from hydrazero.trainer.step_cost import StepCost, planned_size, step_cost

FILLED = 0.96
"""Share of a batch's atoms that is used (make bench: packing_fill)."""
UNCOMPILED_STAGE = 3
"""Stage of ZeRO whose steps run as they are, whatever train.compile says."""
MANIFEST_READERS = 1
"""Ranks that read each manifest; they tell the others."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is asked for."""

    config: RunConfig
    site: Site
    nodes: int
    ranks_per_node: int
    global_batch: int
    """Structures in a step; 0: what the run file's accumulation gives."""
    hours: float
    """Of a job; 0: the site's most for so many nodes."""
    bench: Path | None

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self.nodes * self.ranks_per_node


def plan(asked: Asked) -> dict[str, Any]:
    """Return the plan as plain types; raises ConfigError for what the site lacks and what does not divide or fit."""
    config = asked.config
    check_ways(asked.site)
    site = replace(asked.site, nodes=replace(asked.site.nodes, dies=asked.ranks_per_node))
    ds_config, data = deepspeed_config(config), planned_data(config)
    precision, gpu = precision_of(ds_config), site.die.kind == "gpu"
    settings, tasks = config.model.settings(), len(config.tasks)
    # Without the kernels for CPUs every atom goes through the heads of all tasks.
    per_atom, one_head = step_cost(settings, tasks if gpu else 1), step_cost(settings, 1)
    run = Run(
        size=planned_size(config),
        ds_config=ds_config,
        tasks=tasks,
        quantities=3,
        features=config.model.features,
        balance_every=config.balance.every if tasks > 1 else 0,
        average=bool(config.train.average),
    )
    atoms = mean_atoms(data, config.data.temperature)
    per_batch = structures_of(config.batch, atoms)
    micro = accumulation(asked, per_batch, run.micro_batches)
    run = run.with_micro_batches(micro)
    compiled = config.train.compile and run.stage != UNCOMPILED_STAGE
    pace = pace_of(site.die, precision, asked.bench, compiled=compiled)
    stepper = Stepper(run=run, site=site, pace=pace, cost=per_atom, shape=config.batch, workers=config.data.workers)
    memory = memory_table(run, per_atom, asked)
    check_fits(memory, run, per_atom, asked)
    time = stepper.time(asked.ranks, micro)
    return {
        "run": config.run.out,
        "site": {"name": site.name, "about": site.about, "nodes": asked.nodes, "ranks": asked.ranks},
        "deepspeed": {"stage": run.stage, "precision": precision.label, "compiled": compiled},
        "model": {
            "encoder": config.model.encoder,
            "features": config.model.features,
            "encoder_parameters": run.size.encoder,
            "heads": run.size.heads,
        },
        "batch": {
            **asdict(config.batch),
            "structures_filled": per_batch,
            "atoms_of_structure": atoms,
            "accumulation": micro,
            "global_batch": asked.ranks * per_batch * micro,
        },
        "memory": memory,
        "memory_of_die": site.die.memory.value,
        "messages": [{**asdict(message), **asdict(one)} for message, one in stepper.sent(asked.ranks, micro)],
        "step": {**asdict(time), "seconds": time.seconds, "overlapped": time.overlapped},
        "pace": {**asdict(pace), "seconds_of_arithmetic_and_memory": pace.parts(per_atom, config.batch)},
        "stages": stages(stepper, memory, asked, micro),
        "scaling": {"weak": stepper.weak(RANKS, micro), "strong": stepper.strong(RANKS, RANKS[-1])},
        "heads": {
            name: {**asdict(each), "seconds": each.seconds}
            for name, each in placements(stepper, one_head, asked.ranks, micro).items()
        },
        "files": files(asked, data, per_batch * micro / time.seconds),
        "epoch": epoch(asked, data, asked.ranks * per_batch * micro, time.seconds),
        "tasks": [{**asdict(task), "bytes": task.bytes, "shards": task.shards} for task in data],
        "collectives": asdict(site.collectives),
        "sources": sources(site),
    }


def structures_of(shape: BatchShape, atoms: float) -> int:
    """Structures in a batch, by whichever budget is used up first, whole."""
    return max(min(shape.structures, int(FILLED * shape.atoms / atoms)), 1)


def accumulation(asked: Asked, per_batch: int, own: int) -> int:
    """Return the batches of a rank in a step; raises ConfigError, with what divides, if the global batch does not."""
    wanted, at_once = asked.global_batch, asked.ranks * per_batch
    if not wanted:
        return own
    if wanted % at_once:
        near = sorted({max(wanted // at_once, 1), wanted // at_once + 1})
        ways = " or ".join(f"{count * at_once:,} ({count} batches of each rank)" for count in near)
        raise ConfigError(
            f"--global-batch {wanted:,} is no multiple of {asked.ranks:,} ranks times {per_batch} structures; nearest "
            f"{'is' if len(near) == 1 else 'are'} {ways}."
        )
    return wanted // at_once


def memory_table(run: Run, per_atom: StepCost, asked: Asked) -> list[dict[str, Any]]:
    """Return what a die holds under each ZeRO stage, in the run's precision and in those that the site's dies have."""
    rows = []
    for precision in (item for item in PRECISIONS if PEAKS.get(item.key, "float32") in asked.site.die.flops):
        for stage in precision.stages:
            other = in_precision(run, precision).with_stage(stage)
            held = held_by(other, per_atom, asked, asked.config.batch)
            own = stage == run.stage and precision.key == run.precision.key
            rows.append({"stage": stage, "precision": precision.label, "own": own, **asdict(held), "total": held.total})
    return rows


def in_precision(run: Run, precision: Precision) -> Run:
    """Return the same run in another precision."""
    kept = {key: value for key, value in run.ds_config.items() if key not in {item.key for item in PRECISIONS}}
    tables = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    if precision.key:
        kept[precision.key] = tables.get(precision.key, {"enabled": True})
    return replace(run, ds_config=kept).with_stage(precision.stages[0])


def held_by(run: Run, per_atom: StepCost, asked: Asked, shape: BatchShape) -> DieMemory:
    """Return what a die holds with a batch of a shape."""
    number = {"fp64": 2.0}.get(run.precision.key, 1.0)
    kept = per_atom.bytes_per_atom * shape.atoms + per_atom.bytes_per_slot * shape.slots
    return die_memory(
        run,
        asked.ranks,
        activations=PEAK_OVER_KEPT * kept * number,
        gpu=asked.site.die.kind == "gpu",
        workers=asked.config.data.workers,
    )


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
        fits = row["total"] <= asked.site.die.memory.value
        rows.append({"stage": row["stage"], **asdict(time), "seconds": time.seconds, "fits": fits, "own": row["own"]})
    return rows


def check_fits(memory: Sequence[dict[str, Any]], run: Run, per_atom: StepCost, asked: Asked) -> None:
    """Raise ConfigError, with the nearest plan that does, if a die cannot hold the run."""
    (own,) = (row for row in memory if row["own"])
    room = asked.site.die.memory.value
    if own["total"] <= room:
        return
    taken = f"a die of {asked.site.name} has {room / 1e9:.3g} GB, and the run takes {own['total'] / 1e9:.3g} GB on it"
    others = [row for row in memory if row["precision"] == own["precision"] and row["stage"] > own["stage"]]
    for row in others:
        if row["total"] <= room:
            raise ConfigError(f"{taken}; under ZeRO {row['stage']} it takes {row['total'] / 1e9:.3g} GB and fits.")
    states = own["total"] - own["activations"]
    share = (room - states) / own["activations"]
    if share <= 0:
        raise ConfigError(f"{taken}, {states / 1e9:.3g} GB of it whatever the batch: take a smaller model.")
    fitting = scaled(asked.config.batch, share)
    times = run.micro_batches * -(-asked.config.batch.atoms // max(fitting.atoms, 1))
    raise ConfigError(
        f"{taken}; a batch of structures = {fitting.structures}, atoms = {fitting.atoms}, slots = {fitting.slots}, "
        f"edges = {fitting.edges} fits ([batch]), with {times} of them a step (deepspeed.gradient_accumulation_steps)."
    )


def files(asked: Asked, data: Sequence[TaskData], structures_per_s: float) -> dict[str, Any]:
    """Return what is opened and read, by all ranks together; `structures_per_s` is what a rank consumes."""
    site, lanes = asked.site, asked.ranks * max(asked.config.data.workers, 1)
    read = reading(data, asked.config.data.temperature, lanes)
    epochs_per_s = asked.ranks * structures_per_s / read.structures
    bandwidth, opens = read.bytes * epochs_per_s, read.blocks * epochs_per_s
    return {
        "shards": read.shards,
        "shards_per_rank": read.shards / asked.ranks,
        "bytes": sum(task.bytes for task in data),
        "amplification": read.bytes / max(sum(task.bytes for task in data), 1.0),
        "manifest_bytes": read.manifest_bytes,
        "opens_at_start": len(data) * MANIFEST_READERS + lanes * len(data),
        "seconds_of_opens_at_start": (len(data) * MANIFEST_READERS + lanes * len(data)) / site.files.opens.value,
        "node_local": site.files.node_local,
        "seconds_of_staging": asked.nodes * sum(task.bytes for task in data) / site.files.bandwidth.value,
        "opens_per_s": opens,
        "opens_share": opens / site.files.opens.value,
        "bandwidth": bandwidth,
        "bandwidth_share": bandwidth / site.files.bandwidth.value,
    }


def epoch(asked: Asked, data: Sequence[TaskData], global_batch: int, seconds: float) -> dict[str, float]:
    """Return steps, time and node-hours of a pass over the data, evaluations and checkpoints left aside."""
    structures = sum(task.structures for task in data)
    steps = -(-structures // global_batch)
    hours = steps * seconds / 3600
    longest = asked.hours or longest_hours(asked.site, asked.nodes, "")
    return {
        "structures": structures,
        "steps": steps,
        "hours": hours,
        "node_hours": hours * asked.nodes,
        "jobs": -(-hours // longest) if hours > 0 else 0,
        "hours_of_job": longest,
        "run_hours": asked.config.train.steps * seconds / 3600,
        "run_epochs": asked.config.train.steps / steps,
    }


def sources(site: Site) -> dict[str, dict[str, Any]]:
    """Return every number of the site with where it is from."""
    named = {
        "die.memory": site.die.memory,
        "die.memory_bandwidth": site.die.memory_bandwidth,
        **{f"die.flops.{key}": value for key, value in site.die.flops.items()},
        "node_link.bandwidth": site.node_link.bandwidth,
        "network.bandwidth": site.network.bandwidth,
        "files.bandwidth": site.files.bandwidth,
        "files.opens": site.files.opens,
    }
    return {name: asdict(measure) for name, measure in named.items()}
