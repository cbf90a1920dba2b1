"""A dry run checks everything and does two steps, but writes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hydrazero.models.task_facts import known_elements
from hydrazero.shards.device import has_gpu
from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.manifest import Manifest, check_shard_files
from hydrazero.shards.stream.stream import SplitReader, evaluation_batches
from hydrazero.shards.text.foreign_text import escaped
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.config.sections import DataSection, TaskSection
from hydrazero.trainer.cost.device_memory import device_memory
from hydrazero.trainer.cost.run_memory import RunMemory, check_memory, memory_of_ranks, step_bytes
from hydrazero.trainer.cost.step_cost import ModelSize
from hydrazero.trainer.cost.traffic import Run
from hydrazero.trainer.engine.engine import gathered_parameters
from hydrazero.trainer.engine.losses import leave_out_unseen
from hydrazero.trainer.engine.step_guard import NonFiniteLossError
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.zero_layout import full_size
from hydrazero.trainer.evaluation.interval import Interval
from hydrazero.trainer.evaluation.validation import next_on_any_rank
from hydrazero.trainer.loop import Trainer
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.progress_line import wide_console
from hydrazero.trainer.records.run_log import SilentLog
from hydrazero.trainer.rehearsal.dry_run_tables import Findings, MeasuredSteps, run_table, tasks_table
from hydrazero.trainer.setup import (
    CheckedRun,
    engine_of,
    run_parts,
    weight_average_of,
    with_heads,
)
from hydrazero.trainer.start.resume import check_run_folder, check_same_model

LOOKED_AT = 8
"""Number of batches of each rank, including those of the steps, whose filling is measured."""


def dry_run(config: RunConfig, checked: CheckedRun, resume: bool) -> None:
    """Check everything, do two steps and a validation batch, and print what the run will take.

    Raises HydrazeroError on every rank that a fault concerns.
    """
    manifests = checked.manifests
    at_hand = memory_of_ranks()
    checked, heads = with_heads(config, checked, resume)
    engine = engine_of(config, checked)
    if resume:
        check_same_model(Path(config.run.out), engine.module.model.facts())
    memory = RunMemory(step=_step_bytes(config), states=_state_bytes(config, checked, engine), at_hand=at_hand)
    check_memory(memory, config.batch, config.model.cutoff, manifests)
    log = SilentLog()
    average = weight_average_of(engine, config.train.average)
    parts = run_parts(config, checked, engine, average, stop=StopRequest(0.0), log=log)
    measured = _measure(Trainer(Path(config.run.out), config.train, parts), log)
    found = Findings(
        config=config, ds_config=checked.ds_config, manifests=manifests, engine=engine, memory=memory, measured=measured
    )
    faults = _file_faults(config.tasks, config.data, manifests)
    said = [*heads, *checked.warnings, *faults, *_elements_left_out(manifests), *_doubts(manifests), *log.sentences]
    if distributed.rank() == 0:
        console = wide_console(stderr=False)
        console.print(tasks_table(found))
        console.print(run_table(found))
        for sentence in [*said, _result(Path(config.run.out), resume)]:
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _result(run_dir: Path, resume: bool) -> str:
    """Return the last sentence of a dry run."""
    if resume:
        return "dry run: the run can be resumed; nothing was written."
    try:
        check_run_folder(run_dir, resume)
    except ConfigError as error:
        return f"dry run: nothing was written; the settings can be used, but {error}"
    return "dry run: the run can start; nothing was written."


def _step_bytes(config: RunConfig) -> float:
    """Return the memory of a step in bytes, which rank 0 measures."""
    mine = step_bytes(config.model.settings(), config.batch) if distributed.rank() == 0 else 0.0
    return float(distributed.gather_objects(mine)[0])


def _state_bytes(config: RunConfig, checked: CheckedRun, engine: TrainingEngine) -> float:
    parameters = sum(full_size(parameter) for parameter in engine.module.parameters())
    run = Run(
        size=ModelSize(encoder_groups=(parameters,), head_groups=(0,)),
        ds_config=checked.ds_config,
        tasks=len(config.tasks),
        quantities=len(engine.module.objective.quantities),
        features=config.model.features,
        balance_every=config.balance.every,
        average=bool(config.train.average),
    )
    return device_memory(run, distributed.ranks(), activations=0.0, gpu=has_gpu(), workers=config.data.workers).states


def _measure(trainer: Trainer, log: SilentLog) -> MeasuredSteps:
    """Do two steps and a validation batch; measure how full some batches are."""
    seen: list[GraphBatch] = []
    batches = _remembered(iter(trainer.parts.stream), seen)
    trainer.engine.train()
    trainer.one_step(batches, Interval())  # it includes whatever is done only once
    interval, began = Interval(), time.monotonic()
    trainer.one_step(batches, interval)
    seconds = time.monotonic() - began
    if not interval.steps:  # skipped, on all ranks
        raise NonFiniteLossError(log.sentences[-1].removeprefix("warning: "))
    for _ in range(LOOKED_AT - len(seen)):
        next(batches)
    structures, atoms, slots, in_batch = _fill(seen)
    return MeasuredSteps(
        loss=interval.loss,
        step_seconds=distributed.max_over_ranks(seconds),
        wait_seconds=distributed.max_over_ranks(interval.waited),
        validation_seconds=distributed.max_over_ranks(distributed.together(lambda: validation_seconds(trainer))),
        structures=structures,
        atoms=atoms,
        slots=slots,
        in_batch=in_batch,
    )


def _remembered(batches: Iterator[GraphBatch], seen: list[GraphBatch]) -> Iterator[GraphBatch]:
    for batch in batches:
        seen.append(batch)
        yield batch


def validation_seconds(trainer: Trainer) -> float:
    """Predict one batch of the validation split and return the seconds that it takes; 0 if there is none."""
    engine, settings = trainer.engine, trainer.parts.stream.settings
    reader = SplitReader(settings, "val")
    batch = next_on_any_rank(evaluation_batches(reader, distributed.rank(), distributed.ranks()), settings)
    if batch is None:
        return 0.0
    batch, began = batch.to(distributed.device()), time.monotonic()
    engine.eval()
    leave_out_unseen(batch, engine.module.model, known_elements(engine.module.model.tasks).to(distributed.device()))
    with gathered_parameters(engine):
        sums = engine.module.objective.sums(engine.module.predict(batch), batch)
    engine.train()
    if not torch.isfinite(sums).all():
        raise ConfigError("the errors of a batch of the validation split are not finite; check its labels.")
    return time.monotonic() - began


def _fill(batches: Sequence[GraphBatch]) -> list[float]:
    """Return the used fractions of structures, atoms and slots, and the structures in a batch; means over ranks."""
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


def _file_faults(tasks: Sequence[TaskSection], data: DataSection, manifests: Sequence[Manifest]) -> list[str]:
    """Return warnings about missing files, or files of another size, that the run would skip."""
    faults = []
    if data.on_bad_shard == "skip":
        for task, manifest in zip(tasks, manifests, strict=True):
            try:
                check_shard_files(manifest, data.folder(task))
            except ShardError as error:
                faults.append(f"warning: {error} (data.on_bad_shard = 'skip': the run leaves it out)")
    return faults


def _doubts(manifests: Sequence[Manifest]) -> list[str]:
    """Return what the conversions found doubtful in the labels."""
    return [f"warning: task '{manifest.task}': {escaped(text)}" for manifest in manifests for text in manifest.warnings]


def _elements_left_out(manifests: Sequence[Manifest]) -> list[str]:
    return [
        f"task '{manifest.task}': structures with {', '.join(sorted(strange))} are left out of validation and test, "
        "since no training structure holds it"
        for manifest in manifests
        if (strange := set(manifest.elements) - set(manifest.trained_elements))
    ]
