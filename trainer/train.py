"""One rank of a training run: `deepspeed --num_gpus N --module hydrazero.trainer.train RUN.toml`, srun, or mpirun."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hydrazero.models.atomistic import model_from_facts
from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.trainer.checkpoint.folders import checkpoints
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import RunConfig, load_run_config
from hydrazero.trainer.records.run_files import (
    MODEL_FACTS_NAME,
    RUN_NAME,
    read_json,
    truncate_metrics,
    write_json,
    writing,
)
from hydrazero.trainer.records.run_record import add_resume, read_record, run_record

if TYPE_CHECKING:
    from hydrazero.models.atomistic import AtomisticModel
    from hydrazero.models.task_facts import TaskFacts
    from hydrazero.shards.manifest import Manifest
    from hydrazero.shards.stream.stream import StreamSettings
    from hydrazero.trainer.engine.training_step import TrainedModel


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """What the checks before a run have read."""

    ds_config: dict[str, Any]
    """DeepSpeed JSON."""
    facts: list[TaskFacts]
    manifests: tuple[Manifest, ...]
    """Of each task."""
    warnings: list[str]
    """Sentences for the start of the run."""
    start: AtomisticModel | None
    """Model whose weights the run starts with."""
    rows: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of each task, heads of the start whose mean its own begins as."""

    def structures(self) -> tuple[int, ...]:
        """Training structures of each task."""
        return tuple(manifest.structures("train") for manifest in self.manifests)


def check_run(
    config: RunConfig, resume: bool, *, has_gpu: bool | None = None, manifests: Sequence[Manifest] | None = None
) -> CheckedRun:
    """Check everything that can be checked before training; raises HydrazeroError.

    `has_gpu` says so of where the run will be, if that is not here; manifests are read unless they are given.
    """
    checked = check_settings(config, has_gpu=has_gpu, manifests=manifests)
    run_dir = Path(config.run.out)
    if resume:
        if not (run_dir / RUN_NAME).exists():
            raise ConfigError(f"run folder {run_dir} holds no run to go on with; leave out --resume, or set run.out.")
        read_record(run_dir)
    elif (run_dir / RUN_NAME).exists():
        raise ConfigError(
            f"run folder {run_dir} holds a run already; use --resume to go on with it, remove it, or set run.out."
        )
    # A run that was resumed before it had a checkpoint starts as it did at first.
    if config.run.start_from and not checkpoints(run_dir):
        from hydrazero.trainer.checkpoint.start_weights import model_to_start_from, rows_of_same_name
        from hydrazero.trainer.finetune.head_starts import check_heads

        start = model_to_start_from(config.run.start_from, config.model.settings().encoder)
        check_heads(config, start)
        return replace(checked, start=start, rows=rows_of_same_name([task.name for task in config.tasks], start))
    return checked


def with_heads(config: RunConfig, checked: CheckedRun, resume: bool) -> tuple[CheckedRun, list[str]]:
    """Let tasks take over what their heads begin as, the same on every rank; returns sentences on it too.

    A run that is resumed has the facts that it was started with. Called on every rank.
    """
    from hydrazero.trainer.finetune.head_starts import HeadStart, head_starts, resumed_facts
    from hydrazero.trainer.ranks import distributed

    if not any(task.init_head for task in config.tasks):
        return checked, []
    if resume:
        checked = replace(checked, facts=resumed_facts(config, checked.facts))
    if (start := checked.start) is None:
        return checked, []
    mine: list[HeadStart] = distributed.together(
        lambda: head_starts(config, start, checked.facts) if distributed.rank() == 0 else []
    )
    starts: list[HeadStart] = distributed.gather_objects(mine)[0]
    facts = checked.facts if resume else [each.facts for each in starts]
    rows = {index: each.rows for index, each in enumerate(starts)}
    return replace(checked, facts=facts, rows=rows), [sentence for each in starts for sentence in each.said]


def check_settings(
    config: RunConfig, *, has_gpu: bool | None = None, manifests: Sequence[Manifest] | None = None
) -> CheckedRun:
    """Check the run file against the shards, whatever the run's folder holds; raises HydrazeroError."""
    from hydrazero.models.atomistic import check_model
    from hydrazero.trainer.config.precision import check_device, precision_of
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
    from hydrazero.trainer.ranks.device import device_kind
    from hydrazero.trainer.records.scalar_log import check_wandb

    check_wandb(config)
    ds_config = deepspeed_config(config)
    check_device(precision_of(ds_config), has_gpu=device_kind() != "cpu" if has_gpu is None else has_gpu)
    if manifests is None:
        manifests = task_manifests(config)
    else:
        check_copies(config, manifests)
    facts = [task_facts(task, manifest) for task, manifest in zip(config.tasks, manifests, strict=True)]
    check_model(config.model.settings(), facts)
    check_weights(config, facts)
    for task, found, manifest in zip(config.tasks, facts, manifests, strict=True):
        check_labels(task, config.loss, found, manifest)
    return CheckedRun(
        start=None,
        ds_config=ds_config,
        facts=facts,
        manifests=tuple(manifests),
        warnings=[
            text
            for task, manifest in zip(facts, manifests, strict=True)
            for text in (
                charge_warning(task, manifest),
                budget_warning(task.name, manifest, config.batch, config.model.cutoff),
                cutoff_warning(task.name, manifest, config.model.cutoff),
            )
            if text
        ],
    )


def run_rank(config: RunConfig, resume: bool, used_hours: float = 0.0) -> None:
    """Train on this rank; raises HydrazeroError on every rank that a fault concerns.

    Of `train.max_hours` some may be over, by tries before this one.
    """
    from hydrazero.trainer.config.tasks import task_manifests
    from hydrazero.trainer.ranks import distributed

    def job() -> None:
        # Nobody goes on before all have checked: rank 0 would make the folder that the others want to see absent.
        manifests = distributed.from_first(lambda: task_manifests(config))
        checked = distributed.together(lambda: check_run(config, resume, manifests=manifests))
        _train(config, resume, checked, used_hours)

    on_ranks(config, job)


def on_ranks(config: RunConfig, job: Callable[[], None]) -> None:
    """Do a job on this rank within the group of all of them; raises what it raises."""
    from hydrazero.trainer.ranks import distributed

    distributed.start_ranks(config.train.timeout_minutes)
    try:
        job()
        distributed.wait_for_all()  # a rank that left early would tear down connections that others still use
    except Exception as error:
        lost = distributed.lost_contact(error)
        if lost is None:
            distributed.stop_ranks()
            raise
        raise lost from error  # the group is left as it is: to leave it properly takes the others too
    distributed.stop_ranks()


def _train(config: RunConfig, resume: bool, checked: CheckedRun, used_hours: float) -> None:
    from hydrazero.shards.stream.stream import TrainStream
    from hydrazero.trainer.balance import BalanceFacts
    from hydrazero.trainer.checkpoint.save_load import load_checkpoint, resumed_from
    from hydrazero.trainer.engine.parameter_groups import frozen
    from hydrazero.trainer.engine.run_balance import RunBalance
    from hydrazero.trainer.engine.step_guard import StepGuard
    from hydrazero.trainer.engine.weight_average import WeightAverage
    from hydrazero.trainer.finetune.head_starts import started_from
    from hydrazero.trainer.loop import RunParts, Trainer
    from hydrazero.trainer.ranks import distributed
    from hydrazero.trainer.ranks.stop_signals import StopRequest
    from hydrazero.trainer.records.run_log import RunLog

    checked, heads = with_heads(config, checked, resume)
    engine = engine_of(config, checked)
    trained: TrainedModel = engine.module
    described, run_dir = trained.model.facts(), Path(config.run.out)
    average = WeightAverage(engine, config.train.average) if config.train.average else None
    state: dict[str, Any] = {"step": 0, "stream": None}
    said = [] if checked.start is None else [*started_from(config, checked.start, checked.rows), *heads]
    said += [sentence] if (sentence := frozen(trained)) is not None else []
    if resume:
        check_same_model(run_dir, described)
        folder, damaged = _checkpoint_to_resume(run_dir)
        said += damaged
        if folder is not None:
            state = load_checkpoint(engine, folder, average)
            said.append(resumed_from(state, engine))
    settings = stream_settings(config, checked)
    stream = TrainStream(settings, distributed.rank(), distributed.ranks(), state["stream"])
    balance = RunBalance(config.balance, BalanceFacts(structures=checked.structures()), trained)

    def note_start() -> None:
        if resume:
            truncate_metrics(run_dir, state["step"])
            add_resume(run_dir, config, state["step"], distributed.ranks())
        else:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json(run_dir / MODEL_FACTS_NAME, described)
            write_json(run_dir / RUN_NAME, run_record(config, checked.ds_config, distributed.ranks()))

    # Only now that nothing has refused to start is it a run, or one resume more.
    distributed.together(lambda: writing(run_dir, note_start) if distributed.rank() == 0 else None)
    guard = StepGuard(config.train.max_skipped, config.train.skip_spikes)
    log = RunLog(config, state["step"])
    with log, StopRequest(config.train.max_hours, used_hours, config.train.budget_seconds) as stop:
        for sentence in [*said, *checked.warnings]:
            log.say(sentence)
        if resume and state["step"] == 0:
            log.say(f"{run_dir} holds no checkpoint: the run starts again from step 0.")
        if config.train.compile:
            log.say(compile_steps(engine))
        parts = RunParts(
            engine=engine, stream=stream, balance=balance, average=average, guard=guard, stop=stop, log=log
        )
        trainer = Trainer(config, parts)
        if state["step"]:
            trainer.load(state)
        trainer.train()


def engine_of(config: RunConfig, checked: CheckedRun) -> Any:
    """Return the engine around the model that a run starts with."""
    import torch

    from hydrazero.models.atomistic import AtomisticModel
    from hydrazero.trainer.checkpoint.start_weights import start_from
    from hydrazero.trainer.config.precision import precision_of
    from hydrazero.trainer.engine.engine import make_engine
    from hydrazero.trainer.engine.losses import make_objective
    from hydrazero.trainer.engine.parameter_groups import freeze
    from hydrazero.trainer.engine.training_step import TrainedModel
    from hydrazero.trainer.finetune.methods import prepare, rate_factors
    from hydrazero.trainer.ranks.distributed import device

    torch.manual_seed(config.run.seed)
    weights = precision_of(checked.ds_config).weights
    model = AtomisticModel(config.model.settings(), checked.facts).to(device(), weights)
    if checked.start is not None:
        start_from(model, checked.start, checked.rows)
    freeze(model, config.train.freeze)
    prepare(model, config.finetune)
    objective = make_objective(model, config.loss, [task.weight for task in config.tasks])
    factors = rate_factors([name for name, _ in model.named_parameters()], config.finetune)
    return make_engine(TrainedModel(model, objective), checked.ds_config, factors)


def _checkpoint_to_resume(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the last whole checkpoint, None if there is none yet, and sentences on damaged ones; the same everywhere.

    Only rank 0 looks: it renames what is damaged.
    """
    from hydrazero.trainer.checkpoint.folders import usable_checkpoint
    from hydrazero.trainer.ranks import distributed

    found: tuple[Path | None, list[str]] = distributed.together(
        lambda: usable_checkpoint(run_dir) if distributed.rank() == 0 else (None, [])
    )
    chosen: tuple[Path | None, list[str]] = distributed.gather_objects(found)[0]
    return chosen


def stream_settings(config: RunConfig, checked: CheckedRun) -> StreamSettings:
    """Return what a run's stream of batches is made with."""
    from hydrazero.models.task_facts import targets_of
    from hydrazero.shards.stream.stream import StreamSettings
    from hydrazero.shards.targets import TargetColumn
    from hydrazero.trainer.config.precision import precision_of

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


def compile_steps(engine: Any) -> str:
    """Let the engine's steps be compiled where that is possible; returns a sentence on it for the log."""
    if engine.zero_optimization_stage() == 3:
        return "compile: not under ZeRO stage 3, which takes parameters away between layers; steps run eagerly."
    if engine.fp16_enabled():
        return "compile: not in fp16, where the loss is scaled before it is differentiated; steps run eagerly."
    reason = engine.module.compile_steps()
    if reason is None:
        return "compile: each step is one graph, compiled when its first batch comes, which takes about a minute."
    return f"compile: each step is one graph, but without the CPU kernels: {reason}."


def check_same_model(run_dir: Path, described: dict[str, Any]) -> None:
    """Raise ConfigError unless the run file still describes the model and tasks that the run was started with."""
    known = model_from_facts(read_json(run_dir / MODEL_FACTS_NAME)).facts()  # an older run says less
    if json.loads(json.dumps(known)) != json.loads(json.dumps(described)):
        width, own = (facts["settings"]["encoder"]["norm_width"] for facts in (known, described))
        if width != own:
            raise ConfigError(f"{run_dir} was started with model.norm_width = {width:g}; set the same to resume it.")
        raise ConfigError(
            f"{run_dir} was started with another model, other tasks or other shards than the run file names now; "
            "resume with the same ones, or start a new run (remove the folder, or set run.out)."
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value of the run file."
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the run.")
@click.option("--dry-run", "trial", flag_value="dry-run", help="Check everything and do two steps; write nothing.")
@click.option("--profile", "trial", flag_value="profile", help="Profile a few steps, without the run itself.")
@click.option("--local_rank", "--local-rank", default=None, type=int, hidden=True)  # DeepSpeed's launcher passes it
@click.option("--launched-by", default=None, type=int, hidden=True)  # the process id of `hydrazero train`
@click.option("--used-hours", default=0.0, hidden=True)  # by its tries before this one
def main(
    run_file: Path,
    overrides: Sequence[str],
    resume: bool,
    trial: str | None,
    local_rank: int | None,
    launched_by: int | None,
    used_hours: float,
) -> None:
    """Train one rank of RUN_FILE; start it with deepspeed, srun, mpirun, or alone."""
    from hydrazero.trainer.ranks.distributed import LostContactError, exit_rank, launcher_rank
    from hydrazero.trainer.ranks.exit_status import FAILED
    from hydrazero.trainer.ranks.launcher import end_with
    from hydrazero.trainer.trial import run_trial

    if launched_by is not None:
        end_with(launched_by)
    try:
        config = load_run_config(run_file, overrides)
        if trial is None:
            run_rank(config, resume, used_hours)
        else:
            run_trial(trial, config, resume)
    except HydrazeroError as error:
        # The process group is gone by now, or was never there; what the launcher has told is.
        # `hydrazero train` sees which rank has ended, and says so itself.
        lost_and_known = launched_by is not None and isinstance(error, LostContactError)
        if not lost_and_known and (launcher_rank() == 0 or not error.on_every_rank):
            click.echo(f"Error: {error}", err=True)
        exit_rank(error.exit_status)
    except KeyboardInterrupt:
        exit_rank(FAILED)
    except Exception:
        traceback.print_exc()
        exit_rank(FAILED)
    exit_rank(0)


if __name__ == "__main__":
    main()
