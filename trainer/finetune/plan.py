"""The run file of a fine-tuning: what suits the model, the number of structures and the method, as readable TOML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.manifest import Manifest, read_manifest
from hydrazero.shards.stream.batch_proposal import demand_of, propose
from hydrazero.shards.stream.stream import SplitReader, StreamSettings
from hydrazero.trainer.config.finetune_section import FULL, HEADS, LAYERWISE, LORA, OWN
from hydrazero.trainer.cost.step_memory import SHARE, StepMemory, memory_at_hand

RATES = {FULL: 5e-4, HEADS: 2e-3, LORA: 2e-3, LAYERWISE: 1e-3}
"""Learning rates: fewer weights, or smaller changes of them, bear larger ones."""
LONG = 2000
"""Steps from which on averages of the weights go as far back as in other runs."""
COMPILED = 150_000
"""Atoms, padding among them, in all steps of a rank from which on the minute that compiling takes is worth it: so many
take 70 s (molecules) to 290 s (metals) without, 20 s to 40 s with it (`make bench`, rows `..._train_..._atoms`)."""
EVALUATIONS = 20
PATIENCE = 6
"""Evaluations without a new lowest validation loss after which the run stops."""
FEW = 10
"""Validation structures below which their loss is too rough a guide to stop by."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a user asks for."""

    model: Path
    """Exported model or run folder to start from."""
    shards: Path
    out: Path
    method: str
    init_head: str
    """Name of a head, 'mean' or 'new': the nearest one is known by now."""
    replay: float
    """Share of structures of old tasks in batches; 0: none."""
    replayed: tuple[Path, ...]
    """Shards of the old tasks in batches."""
    ranks: int
    steps: int | None
    rate: float | None
    """Learning rate."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run file's content."""

    table: dict[str, Any]
    said: tuple[str, ...]
    """Sentences on what was chosen."""


def plan_finetuning(wanted: Wanted, start: AtomisticModel) -> Plan:
    """Choose everything that was not asked for; raises ConfigError for what cannot be had, ShardError for shards."""
    manifest = read_manifest(wanted.shards)
    train, val = manifest.structures("train"), manifest.structures("val")
    structures = _structures(train, wanted.ranks)
    steps = wanted.steps or min(max(round(100 * math.sqrt(train)), 300), 20_000)
    tasks = _tasks(wanted, manifest)
    shape = _batch(start, tasks, structures, wanted.ranks)
    table: dict[str, Any] = {
        "run": {"out": str(wanted.out), "start_from": str(wanted.model)},
        "tasks": tasks,
        "finetune": {"method": wanted.method},
        "model": _model(start, tasks),
        "batch": shape.model_dump(),
        "loss": {"kind": "l1", "energy_weight": 5.0},
        # Weights and shares say how much old tasks count; a known one's gradients are short, its weight would grow.
        "balance": {"method": "uniform"},
        "train": {
            "steps": steps,
            "evaluate_every": max(steps // EVALUATIONS, 1),
            "checkpoint_every": max(steps // 4, 1),
            "keep_best": val >= FEW,
            "patience": PATIENCE if val >= FEW else 0,
            "average": 0.99 if steps < LONG else 0.999,
            "compile": steps * shape.atoms > COMPILED,
        },
        "deepspeed": {"config": "zero1", "optimizer": {"params": {"lr": _rate(wanted)}}},
    }
    said = [
        f"{train:,} training structures: up to {steps:,} steps of about {structures * wanted.ranks} structures, "
        f"learning rate {_rate(wanted):g}."
    ]
    if val < FEW:
        said.append(
            f"{wanted.shards} has {val or 'no'} validation structures, which cannot tell when to stop: the run goes "
            "through, and its last weights are its result."
        )
    return Plan(table=table, said=tuple(said))


def _structures(train: int, ranks: int) -> int:
    """Structures in each rank's batch: an eighth of the training structures, 4 to 32 on all ranks together."""
    wanted = min(max(2 ** round(math.log2(train / 8)), 4), 32) if train > 8 else 4
    return max(wanted // ranks, 1)


def _rate(wanted: Wanted) -> float:
    return RATES[wanted.method] if wanted.rate is None else wanted.rate


def _tasks(wanted: Wanted, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the new task, and old ones whose share of the loss is that of the batches."""
    new: dict[str, Any] = {"name": manifest.task, "shards": str(wanted.shards), "init_head": wanted.init_head}
    if not wanted.replay:
        return [new]
    old = [read_manifest(folder) for folder in wanted.replayed]
    counts = [each.structures("train") for each in old]
    tasks = [new]
    for each, folder, count in zip(old, wanted.replayed, counts, strict=True):
        part = count / sum(counts)
        tasks.append(
            {
                "name": each.task,
                "shards": str(folder),
                "init_head": OWN,
                "share": wanted.replay * part,
                "weight": wanted.replay / (1 - wanted.replay) * part,
            }
        )
    return tasks


def _batch(start: AtomisticModel, tasks: Sequence[Mapping[str, Any]], structures: int, ranks: int) -> BatchShape:
    """Return a batch for about so many structures, for fewer where memory has no room for more."""
    shares = tuple(task.get("share") for task in tasks)
    reader = SplitReader(
        StreamSettings(
            folders=tuple(task["shards"] for task in tasks),
            cutoff=start.settings.encoder.cutoff,
            shape=BatchShape(structures=1, atoms=1, slots=ROW_SLOTS),  # plays no part in reading samples
            shares=() if shares == (None,) else shares,
        ),
        "train",
    )
    demand, memory = demand_of(reader), StepMemory(start.settings)
    shape = propose(demand, reader, structures)
    while structures > 1 and memory.bytes_of(shape) > SHARE * memory_at_hand(ranks):
        structures //= 2
        shape = propose(demand, reader, structures)
    return shape


def _model(start: AtomisticModel, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all settings of the start's model, which the run's is built with again."""
    held = {name for task in tasks for name in read_manifest(task["shards"]).targets}
    replayed = {task["name"] for task in tasks if task["init_head"] == OWN}
    held |= {name for task in start.tasks if task.name in replayed for name in task.targets}
    settings = start.settings.model_dump()
    settings["attention_targets"] = [name for name in settings["attention_targets"] if name in held]
    return {**settings.pop("encoder"), **settings}
