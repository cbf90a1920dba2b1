"""Check a run and put its parts together; training, dry runs, profiles and searches all use this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.model_settings import check_model
from hydrazero.models.ops.compiled import slow_sums
from hydrazero.models.task_facts import TaskFacts, targets_of
from hydrazero.shards.device import device_kind
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.stream.stream import StreamSettings, TrainStream
from hydrazero.shards.targets import TargetColumn
from hydrazero.trainer.balance import BalanceFacts
from hydrazero.trainer.checkpoint.folders import checkpoints
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.precision import check_device, precision_of
from hydrazero.trainer.config.resume_rules import flat_settings
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.config.tasks import (
    budget_warning,
    charge_warning,
    check_copies,
    check_labels,
    check_weights,
    cutoff_warning,
    task_facts,
    task_manifests,
)
from hydrazero.trainer.config.validation import (
    check_validation_labels,
    check_validation_split,
    missing_split_warnings,
    needs_validation,
)
from hydrazero.trainer.engine.engine import make_engine
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.engine.parameter_groups import freeze
from hydrazero.trainer.engine.run_balance import RunBalance
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.loop import RunParts
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.run_log import RunLog
from hydrazero.trainer.records.scalar_log import check_wandb
from hydrazero.trainer.start.head_starts import HeadStart, check_heads, head_starts, resumed_facts
from hydrazero.trainer.start.initial_weights import model_to_start_from, rows_of_same_name, start_from
from hydrazero.trainer.start.methods import prepare, rate_factors
from hydrazero.trainer.start.resume import check_resume, check_run_folder


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """Results of the checks before a run."""

    ds_config: dict[str, Any]
    """Complete DeepSpeed configuration, with the overrides of the run file."""
    facts: list[TaskFacts]
    """What the model has to know about each task."""
    manifests: tuple[Manifest, ...]
    """The manifest of each task's shards."""
    warnings: list[str]
    """Warnings that are logged at the start of the run."""
    start: AtomisticModel | None
    """Model whose weights the run starts with; None for random weights."""
    settings: dict[str, Any]
    """All settings by key: those of the run file, and the complete DeepSpeed JSON."""
    rows: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """For each task, by its index: the heads of `start` whose mean its own head starts as."""

    def structures(self) -> tuple[int, ...]:
        """Return the number of training structures of each task."""
        return tuple(manifest.structures("train") for manifest in self.manifests)


def check_run(
    config: RunConfig, resume: bool, *, has_gpu: bool | None = None, manifests: Sequence[Manifest] | None = None
) -> CheckedRun:
    """Check everything that can be checked before training; raises HydrazeroError.

    `has_gpu` says whether the machine of the run has a GPU, if that is another machine; manifests are read unless they
    are given.
    """
    run_dir = Path(config.run.out)
    check_run_folder(run_dir, resume)
    return check_start(config, resume, has_gpu=has_gpu, manifests=manifests)


def check_start(
    config: RunConfig, resume: bool, *, has_gpu: bool | None = None, manifests: Sequence[Manifest] | None = None
) -> CheckedRun:
    """Check what `check_run` does, except whether the run folder holds a run already."""
    run_dir = Path(config.run.out)
    checked = check_settings(config, has_gpu=has_gpu, manifests=manifests)
    # Files of the run, and blocks of shards, are read by one rank.
    is_first = distributed.rank() == 0
    if resume:
        check_resume(run_dir, checked.settings, config.tasks, shards=is_first)
    if is_first:
        needed = needs_validation(config.train, checked.ds_config)
        check_validation_labels(needed, config.loss, config.data, config.tasks, checked.facts)
    # A run that is resumed before its first checkpoint starts again from the same model.
    if config.run.start_from and not checkpoints(run_dir):
        start = model_to_start_from(config.run.start_from, config.model.settings().encoder)
        check_heads(config.tasks, config.model, start, config.run.start_from)
        return replace(checked, start=start, rows=rows_of_same_name([task.name for task in config.tasks], start))
    return checked


def with_heads(config: RunConfig, checked: CheckedRun, resume: bool) -> tuple[CheckedRun, list[str]]:
    """Return the checked run with the heads that tasks start from, and sentences about them for the log.

    A resumed run keeps the facts that it was started with. Called on every rank, with the same result.
    """
    if not any(task.init_head for task in config.tasks):
        return checked, []
    if resume:
        checked = replace(checked, facts=resumed_facts(config.tasks, checked.facts, Path(config.run.out)))
    if (start := checked.start) is None:
        return checked, []
    mine: list[HeadStart] = distributed.together(
        lambda: head_starts(config.tasks, checked.facts, start, config.finetune) if distributed.rank() == 0 else []
    )
    starts: list[HeadStart] = distributed.gather_objects(mine)[0]
    facts = checked.facts if resume else [each.facts for each in starts]
    rows = {index: each.rows for index, each in enumerate(starts)}
    return replace(checked, facts=facts, rows=rows), [sentence for each in starts for sentence in each.said]


def check_settings(
    config: RunConfig, *, has_gpu: bool | None = None, manifests: Sequence[Manifest] | None = None
) -> CheckedRun:
    """Check the run file against the shards, whatever the run folder contains; raises HydrazeroError."""
    check_wandb(config.run.wandb)
    ds_config = deepspeed_config(config.deepspeed, config.train.steps)
    check_device(precision_of(ds_config), has_gpu=device_kind() != "cpu" if has_gpu is None else has_gpu)
    if manifests is None:
        manifests = task_manifests(config)
    else:
        check_copies(config.tasks, config.data, manifests)
    facts = [task_facts(task, manifest) for task, manifest in zip(config.tasks, manifests, strict=True)]
    check_model(config.model.settings(), facts)
    check_validation_split(needs_validation(config.train, ds_config), config.tasks, manifests)
    check_weights(config.loss, facts)
    for task, found, manifest in zip(config.tasks, facts, manifests, strict=True):
        check_labels(task, config.loss, found, manifest)
    return CheckedRun(
        start=None,
        ds_config=ds_config,
        settings=flat_settings({**config.model_dump(), "deepspeed": ds_config}),
        facts=facts,
        manifests=tuple(manifests),
        warnings=[
            *missing_split_warnings(config.tasks, manifests),
            *(
                text
                for task, manifest in zip(facts, manifests, strict=True)
                for text in (
                    charge_warning(task, manifest),
                    budget_warning(task.name, manifest, config.batch, config.model.cutoff),
                    cutoff_warning(task.name, manifest, config.model.cutoff),
                )
                if text
            ),
        ],
    )


def engine_of(config: RunConfig, checked: CheckedRun) -> TrainingEngine:
    """Return the DeepSpeed engine around the model, with the weights that the run starts with."""
    torch.manual_seed(config.run.seed)
    weights = precision_of(checked.ds_config).weights
    model = AtomisticModel(config.model.settings(), checked.facts).to(distributed.device(), weights)
    if checked.start is not None:
        start_from(model, checked.start, checked.rows)
    freeze(model, config.train.freeze)
    prepare(model, config.finetune)
    objective = make_objective(model, config.loss, [task.weight for task in config.tasks])
    factors = rate_factors([name for name, _ in model.named_parameters()], config.finetune)
    return make_engine(ModelWithLoss(model, objective), checked.ds_config, factors)


def stream_settings(config: RunConfig, checked: CheckedRun) -> StreamSettings:
    """Return the settings of a run's stream of batches."""
    return StreamSettings(
        folders=tuple(config.data.folder(task) for task in config.tasks),
        manifests=checked.manifests,
        dtype=precision_of(checked.ds_config).weights,
        cutoff=config.model.cutoff,
        shape=config.batch,
        seed=config.run.seed,
        temperature=config.data.temperature,
        shares=config.shares,
        workers=config.data.workers,
        on_bad_shard=config.data.on_bad_shard,
        targets=tuple(
            TargetColumn(name=name, of=facts.of, kind=facts.kind) for name, facts in targets_of(checked.facts).items()
        ),
    )


def compile_steps(engine: TrainingEngine) -> str:
    """Compile the engine's steps where that is possible; return a sentence about it for the log."""
    if engine.zero_optimization_stage() == 3:
        return "compile: not possible with ZeRO stage 3, which partitions parameters between layers; steps run eagerly."
    if engine.fp16_enabled():
        return "compile: not possible in fp16, where the loss is scaled before it is differentiated; steps run eagerly."
    reason = engine.module.compile_steps()
    if reason is None:
        said = "compile: each step is one graph, compiled at its first batch, which takes about a minute."
        slow = slow_sums(engine.module.model)
        return said if slow is None else f"{said} Its sums over neighbours are left to plain PyTorch: {slow}."
    return f"compile: each step is one graph, but without the CPU kernels: {reason}."


def weight_average_of(engine: TrainingEngine, decay: float) -> WeightAverage | None:
    """Return the moving average of an engine's weights; None if the decay is 0."""
    return WeightAverage(engine, decay) if decay else None


def run_parts(
    config: RunConfig,
    checked: CheckedRun,
    engine: TrainingEngine,
    average: WeightAverage | None,
    *,
    stop: StopRequest,
    log: RunLog,
    stream_state: Any = None,
) -> RunParts:
    """Return the parts of the training loop; `stream_state` is the position of a resumed run in its data."""
    return RunParts(
        engine=engine,
        stream=TrainStream(stream_settings(config, checked), distributed.rank(), distributed.ranks(), stream_state),
        balance=RunBalance(config.balance, BalanceFacts(structures=checked.structures()), engine.module),
        average=average,
        guard=StepGuard(config.train.max_skipped, config.train.skip_spikes),
        stop=stop,
        log=log,
        settings=checked.settings,
    )
