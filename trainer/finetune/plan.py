"""The run file of a fine-tuning, with settings that suit the model, the number of structures and the method."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.manifest import Manifest, read_manifest
from hydrazero.shards.stream.batch_proposal import demand_of
from hydrazero.shards.stream.stream import SplitReader, StreamSettings
from hydrazero.trainer.config.finetune_section import FULL, HEADS, LAYERWISE, LORA, OWN
from hydrazero.trainer.cost.step_memory import SHARE, StepMemory, memory_at_hand
from hydrazero.trainer.propose.propose_batch import fitting_batch
from hydrazero.trainer.propose.run_length import EVALUATION_SHARE, EVALUATIONS

RATES = {FULL: 5e-4, HEADS: 2e-3, LORA: 2e-3, LAYERWISE: 1e-3}
"""Learning rate of each method: methods that train fewer weights, or smaller changes of them, allow larger rates."""
LONG = 2000
"""Number of steps from which on the average of the weights extends as far back as in other runs."""
COMPILED = 150_000
"""Number of atoms, padding included, in all steps of a rank from which on steps are compiled, which takes a minute:
training on so many takes 70 s (molecules) to 290 s (metals) without compiling, and 20 s to 40 s with it (`make bench`,
rows `..._train_..._atoms`)."""
LEAST_INTERVAL = 10
"""Minimum number of steps between evaluations, since early stopping waits for PATIENCE evaluations."""
FEWEST = 4
"""Minimum number of evaluations, however long they take: the best weights are chosen among them."""
VALIDATION_COST = 0.5
"""Time to evaluate a structure, over that to train on it (PaiNN on ethanol: 0.49)."""
PATIENCE = 6
"""Number of evaluations without a new lowest validation loss after which the run stops."""
FEW = 10
"""Number of validation structures below which their loss is too uncertain for early stopping."""


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """The arguments of `hydrazero finetune`."""

    model: Path
    """Exported model or run folder to start from."""
    folder: Path
    """Shards of the new task."""
    out: Path
    """Run folder, which is made."""
    method: str
    """Method of fine-tuning, a value of finetune.method."""
    init_head: str
    """Name of a head, 'nearest', 'mean' or 'new'."""
    replay: float | None
    """Fraction of structures of old tasks in the batches; None without any."""
    old: tuple[Path, ...]
    """Shards of old tasks."""
    steps: int | None
    """Maximum number of steps; None if it is to be chosen."""
    rate: float | None
    """Learning rate; None if it is to be chosen."""
    ranks: int
    """Number of ranks."""
    overrides: tuple[str, ...]
    """Overrides of the run file, as `key=value`."""


@dataclass(frozen=True, kw_only=True)
class FinetunePlan:
    """The content of a run file."""

    table: dict[str, Any]
    """Tables and values of the run file."""
    sentences: tuple[str, ...]
    """Sentences on what was chosen."""


def plan_finetuning(request: FinetuneRequest, init_head: str, start: AtomisticModel) -> FinetunePlan:
    """Choose all settings that a request leaves open, for a new head with the initial weights of `init_head`.

    `init_head` is the name of a head, 'mean' or 'new'. Raise ShardError for damaged shards.
    """
    manifest = read_manifest(request.folder)
    train, val = manifest.structures("train"), manifest.structures("val")
    structures = _structures(train, request.ranks)
    together = structures * request.ranks
    validated = sum(read_manifest(folder).structures("val") for folder in (request.folder, *_replayed(request)))
    steps = request.steps or min(max(round(100 * math.sqrt(train)), 300), 20_000)
    tasks = _tasks(request, init_head, manifest)
    shape = _batch(start, tasks, structures, request.ranks)
    table: dict[str, Any] = {
        "run": {"out": str(request.out), "start_from": str(request.model)},
        "tasks": tasks,
        "finetune": {"method": request.method},
        "model": _model(start, tasks),
        "batch": shape.model_dump(),
        "loss": {"kind": "l1", "energy_weight": 5.0},
        # The weights of old tasks are set above. Other methods would raise them, since their gradients are short.
        "balance": {"method": "uniform"},
        "train": {
            "steps": steps,
            "evaluate_every": _interval(steps, validated / together),
            "checkpoint_every": max(steps // 4, 1),
            "keep_best": val >= FEW,
            "patience": PATIENCE if val >= FEW else 0,
            "average": 0.99 if steps < LONG else 0.999,
            "compile": steps * shape.atoms > COMPILED,
        },
        "deepspeed": {"config": "zero1", "optimizer": {"params": {"lr": _rate(request)}}},
    }
    sentences = [
        f"{train:,} training structures: up to {steps:,} steps of about {together} structures, "
        f"learning rate {_rate(request):g}."
    ]
    if val < FEW:
        sentences.append(
            f"{request.folder} has {val or 'no'} validation structures, too few for early stopping: the run trains all "
            "steps, and its last weights are its result."
        )
    every = table["train"]["evaluate_every"]
    if (share := _share(every, validated / together)) > 2 * EVALUATION_SHARE:
        sentences.append(
            f"{validated:,} validation structures are evaluated every {every:,} steps, which takes about {share:.0%} "
            f"of the time; hydrazero subset {shlex.quote(str(request.folder))} --val N keeps fewer."
        )
    return FinetunePlan(table=table, sentences=tuple(sentences))


def _interval(steps: int, batches: float) -> int:
    """Return the number of steps between evaluations, each of which takes `batches` batches.

    A run has 20 evaluations, or fewer if these would take more than a fifth of its time or come every few steps.
    """
    affordable = math.ceil(VALIDATION_COST * batches * (1 / EVALUATION_SHARE - 1))
    every = max(steps // EVALUATIONS, LEAST_INTERVAL, affordable)
    return min(every, math.ceil(steps / FEWEST))


def _share(every: int, batches: float) -> float:
    """Return the fraction of a run's time for evaluations of `batches` batches after every `every` steps."""
    return VALIDATION_COST * batches / (every + VALIDATION_COST * batches)


def _structures(train: int, ranks: int) -> int:
    """Return the number of structures in a rank's batch: an eighth of the training structures, 4 to 32 on all ranks."""
    together = min(max(2 ** round(math.log2(train / 8)), 4), 32) if train > 8 else 4
    return max(together // ranks, 1)


def _rate(request: FinetuneRequest) -> float:
    return RATES[request.method] if request.rate is None else request.rate


def _replayed(request: FinetuneRequest) -> tuple[Path, ...]:
    """Return the shards of old tasks that are tasks of the run."""
    return request.old if request.replay else ()


def _tasks(request: FinetuneRequest, init_head: str, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the new task and the old tasks in the batches, whose weights give them the same fraction of the loss."""
    new: dict[str, Any] = {"name": manifest.task, "shards": str(request.folder), "init_head": init_head}
    if not request.replay:
        return [new]
    old = [read_manifest(folder) for folder in request.old]
    counts = [each.structures("train") for each in old]
    tasks = [new]
    for each, folder, count in zip(old, request.old, counts, strict=True):
        part = count / sum(counts)
        tasks.append(
            {
                "name": each.task,
                "shards": str(folder),
                "init_head": OWN,
                "share": request.replay * part,
                "weight": request.replay / (1 - request.replay) * part,
            }
        )
    return tasks


def _batch(start: AtomisticModel, tasks: Sequence[Mapping[str, Any]], structures: int, ranks: int) -> BatchShape:
    """Return a batch of about `structures` structures, or of fewer if they do not fit into memory."""
    shares = tuple(task.get("share") for task in tasks)
    reader = SplitReader(
        StreamSettings(
            folders=tuple(task["shards"] for task in tasks),
            cutoff=start.settings.encoder.cutoff,
            shape=BatchShape(structures=1, atoms=1, slots=ROW_SLOTS),  # has no influence on the samples that are read
            shares=() if shares == (None,) else shares,
        ),
        "train",
    )
    available = SHARE * memory_at_hand(ranks)
    return fitting_batch(reader, demand_of(reader), StepMemory(start.settings), structures, available)[1]


def _model(start: AtomisticModel, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all settings of the starting model, with which the model of the run is built."""
    held = {name for task in tasks for name in read_manifest(task["shards"]).targets}
    replayed = {task["name"] for task in tasks if task["init_head"] == OWN}
    held |= {name for task in start.tasks if task.name in replayed for name in task.targets}
    settings = start.settings.model_dump()
    settings["attention_targets"] = [name for name in settings["attention_targets"] if name in held]
    return {**settings.pop("encoder"), **settings}
