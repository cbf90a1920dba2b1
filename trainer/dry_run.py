"""A dry run: everything is checked and two steps are done, but nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from hydrazero.models.task_facts import known_elements
from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.graph import GraphBatch
from hydrazero.shards.manifest import Manifest, check_shard_files, read_manifest
from hydrazero.shards.plan import mixture_repeats
from hydrazero.shards.stream import SplitReader, evaluation_batches
from hydrazero.trainer import distributed
from hydrazero.trainer.batch_memory import peak_memory_mb
from hydrazero.trainer.config import RunConfig
from hydrazero.trainer.loop import Interval, Trainer, next_on_any_rank
from hydrazero.trainer.losses import leave_out_unseen
from hydrazero.trainer.progress_line import duration, wide_console
from hydrazero.trainer.run_memory import RunMemory, check_memory, megabytes, memory_of_ranks, state_bytes, step_bytes
from hydrazero.trainer.train import CheckedRun, check_same_model, engine_of
from hydrazero.trainer.trial import TrialLog, trial_trainer

LOOKED_AT = 8
"""Batches of each rank that are looked at for how full they are, those of the steps among them."""


@dataclass(kw_only=True)
class Tried:
    """What the steps of a dry run have shown."""

    loss: float
    step_seconds: float
    """Of the second step, the slowest rank's."""
    wait_seconds: float
    """Of these, for data."""
    validation_seconds: float
    """Of one batch on each rank."""
    fill: list[float]
    """Shares of structures, atoms and slots of a batch that are used, and structures in a batch."""


def dry_run(config: RunConfig, checked: CheckedRun, resume: bool) -> None:
    """Check everything, do two steps and a batch of the validation, print what the run will take.

    Raises HydrazeroError on every rank that a fault concerns.
    """
    manifests = [read_manifest(task.shards) for task in config.tasks]
    at_hand = memory_of_ranks()
    engine = engine_of(config, checked)
    model = engine.module.model
    if resume:
        check_same_model(Path(config.run.out), model.facts())
    memory = RunMemory(step=_step_bytes(config), states=_state_bytes(config, checked, engine), at_hand=at_hand)
    check_memory(memory, config.batch, config.model.cutoff, manifests)
    log = TrialLog(config)
    tried = _try(trial_trainer(config, checked, engine, log))
    said = [*checked.warnings, *_file_faults(config, manifests), *_elements_left_out(manifests), *log.said]
    if distributed.rank() == 0:
        _print(config, checked, manifests, memory, tried, engine, said)


def _step_bytes(config: RunConfig) -> float:
    """Bytes of a step; rank 0 alone measures."""
    mine = step_bytes(config.model.settings(), config.batch) if distributed.rank() == 0 else 0.0
    return float(distributed.gather_objects(mine)[0])


def _state_bytes(config: RunConfig, checked: CheckedRun, engine: Any) -> float:
    parameters = sum(_size(parameter) for parameter in engine.module.parameters())
    optimizer = checked.ds_config["optimizer"]["type"]
    stage = engine.zero_optimization_stage()
    return state_bytes(parameters, stage, optimizer, bool(config.train.average), distributed.ranks())


def _size(parameter: Any) -> int:
    """Numbers in a parameter, of which ZeRO 3 holds a part here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _try(trainer: Trainer) -> Tried:
    """Do two steps and a batch of the validation; look at some batches."""
    seen: list[GraphBatch] = []
    batches = _remembered(iter(trainer.parts.stream), seen)
    trainer.engine.train()
    trainer.one_step(batches, Interval())  # what is done once only is done in it
    interval, began = Interval(), time.monotonic()
    trainer.one_step(batches, interval)
    seconds = time.monotonic() - began
    for _ in range(LOOKED_AT - len(seen)):
        next(batches)
    return Tried(
        loss=interval.loss,
        step_seconds=distributed.max_over_ranks(seconds),
        wait_seconds=distributed.max_over_ranks(interval.waited),
        validation_seconds=distributed.max_over_ranks(_validate(trainer)),
        fill=_fill(seen),
    )


def _remembered(batches: Iterator[GraphBatch], seen: list[GraphBatch]) -> Iterator[GraphBatch]:
    for batch in batches:
        seen.append(batch)
        yield batch


def _validate(trainer: Trainer) -> float:
    """Predict one batch of the validation split; returns the seconds that it takes, 0 if there is none."""
    engine, settings = trainer.engine, trainer.parts.stream.settings
    reader = SplitReader(settings, "val")
    batch = next_on_any_rank(evaluation_batches(reader, distributed.rank(), distributed.ranks()), settings)
    if batch is None:
        return 0.0
    batch, began = batch.to(distributed.device()), time.monotonic()
    engine.eval()
    leave_out_unseen(batch, engine.module.model, known_elements(engine.module.model.tasks).to(distributed.device()))
    sums = engine.module.objective.sums(engine.module.predict(batch), batch)
    engine.train()
    if not torch.isfinite(sums).all():
        raise ConfigError("the model predicts no finite values for a batch of the validation split; check its labels.")
    return time.monotonic() - began


def _fill(batches: Sequence[GraphBatch]) -> list[float]:
    """Shares of structures, atoms and slots that are used, structures in a batch; means over all ranks."""
    of_batches = [
        [
            float(batch.structure_mask.float().mean()),
            float(batch.atom_mask.float().mean()),
            float(batch.slot_mask.float().mean()),
            float(batch.structure_mask.sum()),
        ]
        for batch in batches
    ]
    total = torch.tensor(of_batches, dtype=torch.float64).mean(0)
    mean: list[float] = (distributed.sum_over_ranks(total) / distributed.ranks()).tolist()
    return mean


def _file_faults(config: RunConfig, manifests: Sequence[Manifest]) -> list[str]:
    """Say which files are missing or of another size, where the run would skip them."""
    faults = []
    if config.data.on_bad_shard == "skip":
        for task, manifest in zip(config.tasks, manifests, strict=True):
            try:
                check_shard_files(manifest, task.shards)
            except ShardError as error:
                faults.append(f"warning: {error} (data.on_bad_shard = 'skip': the run leaves it out)")
    return faults


def _elements_left_out(manifests: Sequence[Manifest]) -> list[str]:
    return [
        f"task '{manifest.task}': structures with {', '.join(sorted(strange))} are left out of validation and test, "
        "since no training structure holds it"
        for manifest in manifests
        if (strange := set(manifest.elements) - set(manifest.trained_elements))
    ]


def _print(
    config: RunConfig,
    checked: CheckedRun,
    manifests: Sequence[Manifest],
    memory: RunMemory,
    tried: Tried,
    engine: Any,
    said: Sequence[str],
) -> None:
    console = wide_console(stderr=False)
    console.print(_tasks(config, checked, manifests, engine))
    console.print(_facts(config, checked, manifests, memory, tried, engine))
    for sentence in said:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print("dry run: everything is in order, nothing was written.", highlight=False, soft_wrap=True)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _tasks(config: RunConfig, checked: CheckedRun, manifests: Sequence[Manifest], engine: Any) -> Table:
    table = _table(f"{config.run.out}: tasks")
    for heading in ("task", "train", "val", "atoms\nat most", "elements", "drawn\n%", "weight", "trained on"):
        texts = heading in ("task", "trained on")
        table.add_column(heading, justify="left" if texts else "right", no_wrap=heading != "trained on")
    counts = list(checked.structures)
    drawn = [n * repeat for n, repeat in zip(counts, mixture_repeats(counts, config.data.temperature), strict=True)]
    objective = engine.module.objective
    for number, (task, manifest) in enumerate(zip(config.tasks, manifests, strict=True)):
        held = {*manifest.labels, *manifest.targets} | ({"energy"} if "energy_per_atom" in manifest.labels else set())
        used = zip(objective.quantities, objective.predicted[number].tolist(), strict=True)
        table.add_row(
            task.name,
            f"{counts[number]:,}",
            f"{manifest.structures('val'):,}",
            str(manifest.max_atoms),
            str(len(manifest.trained_elements)),
            f"{100 * drawn[number] / sum(drawn):.1f}",
            f"{task.weight:g}",
            ", ".join(name for name, predicted in used if predicted and name in held) or "-",
        )
    return table


def _facts(
    config: RunConfig,
    checked: CheckedRun,
    manifests: Sequence[Manifest],
    memory: RunMemory,
    tried: Tried,
    engine: Any,
) -> Table:
    ranks, accumulated = distributed.ranks(), engine.gradient_accumulation_steps()
    structures, atoms, slots, in_batch = tried.fill
    evaluations = -(-config.train.steps // config.train.evaluate_every)
    per_evaluation = sum(manifest.structures("val") for manifest in manifests) / (max(in_batch, 1.0) * ranks)
    whole = config.train.steps * tried.step_seconds + evaluations * per_evaluation * tried.validation_seconds
    sizes = {item.name: getattr(config.batch, item.name) for item in fields(config.batch)}
    shape = ", ".join(f"{size:,} {name}" for name, size in sizes.items() if size)
    eager = ", eagerly; compiled, the run is faster" if config.train.compile else ""
    ds_config = checked.ds_config
    scheduler = ds_config.get("scheduler", {}).get("type", "no schedule")
    trained = sum(_size(parameter) for parameter in engine.module.parameters() if parameter.requires_grad)
    table = _table("the run")
    table.show_header = False
    for name, value in (
        ("ranks", f"{ranks}, {accumulated} batches of each a step" if accumulated > 1 else str(ranks)),
        ("batch", shape),
        ("filled", f"{structures:.0%} of the structures, {atoms:.0%} of the atoms, {slots:.0%} of the slots"),
        ("model", f"{config.model.encoder}, {trained:,} trained parameters"),
        ("DeepSpeed", f"ZeRO {engine.zero_optimization_stage()}, {ds_config['optimizer']['type']}, {scheduler}"),
        (
            "memory of a rank",
            f"about {megabytes(memory.step)} in a step, {megabytes(memory.states)} of weights, gradients, optimizer; "
            f"{megabytes(memory.at_hand)} are there",
        ),
        ("peak so far", f"{peak_memory_mb():,.0f} MB on rank 0, all of the process"),
        ("loss", f"{tried.loss:.4g} in the second step"),
        ("a step", f"{tried.step_seconds:.3g} s, of which {tried.wait_seconds:.2g} s wait for data{eager}"),
        ("the whole run", f"about {duration(whole)} for {config.train.steps:,} steps and {evaluations} evaluations"),
    ):
        table.add_row(name, value)
    return table
