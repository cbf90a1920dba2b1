"""One rank of a training run: `deepspeed --num_gpus N --module hydrazero.trainer.train RUN.toml`, srun, or mpirun."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.files import write_json
from hydrazero.shards.launcher_variables import launcher_rank
from hydrazero.shards.processes import end_with_parent
from hydrazero.shards.text.foreign_text import echo
from hydrazero.trainer.checkpoint.folders import (
    damage,
    folder_of,
    has_checkpoint,
    latest_checkpoint,
    restoring,
    step_of,
    usable_checkpoint,
)
from hydrazero.trainer.checkpoint.save_load import load_checkpoint, read_state, resumed_from
from hydrazero.trainer.config.resume_rules import sentences_on, starts_anew
from hydrazero.trainer.config.run_file import RunConfig, load_run_config
from hydrazero.trainer.config.setting_change import SettingChange
from hydrazero.trainer.config.tasks import task_manifests
from hydrazero.trainer.engine.optimizer_settings import apply_settings, group_settings
from hydrazero.trainer.engine.parameter_groups import frozen
from hydrazero.trainer.loop import Trainer
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.distributed import LostContactError
from hydrazero.trainer.ranks.exit_status import FAILED, end_process_after
from hydrazero.trainer.ranks.launcher import train_ranks
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, RUN_NAME, truncate_metrics, writing
from hydrazero.trainer.records.run_lock import RUN_LOCK, folder_in_use
from hydrazero.trainer.records.run_log import RunLog
from hydrazero.trainer.records.run_record import add_resume, run_record
from hydrazero.trainer.records.scalar_log import hyperparameters
from hydrazero.trainer.rehearsal.rehearse import rehearse
from hydrazero.trainer.setup import (
    CheckedRun,
    check_run,
    compile_steps,
    engine_of,
    run_parts,
    weight_average_of,
    with_heads,
)
from hydrazero.trainer.start.head_starts import started_from
from hydrazero.trainer.start.resume import changes_since, check_run_folder, check_same_model


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options with which a run is started on this machine."""

    ranks: int
    """Number of ranks."""
    words: Sequence[str] = ()
    """Options that are passed to each rank."""
    resume: bool = False
    """Whether the run continues from its last checkpoint."""
    retries: int = 0
    """Number of further attempts after ranks have failed."""
    threads: int | None = None
    """Number of threads of each rank; None: OMP_NUM_THREADS, or else the rank's share of the cores."""


def train_here(run_file: Path, config: RunConfig, options: TrainOptions) -> str:
    """Train a run on this machine, in this process if it has one rank; return a sentence about the result."""
    check_run(config, options.resume)
    run_dir = Path(config.run.out)
    was_complete = options.resume and _is_complete(config)
    if options.ranks == 1 and not options.retries:
        use_threads(options.threads)
        run_rank(config, options.resume)
    else:
        record = run_dir / RUN_NAME
        retries, threads = options.retries, options.threads
        train_ranks(run_file, options.ranks, options.words, record, retries=retries, threads=threads)
    step, steps = step_of(latest_checkpoint(run_dir)), config.train.steps
    if step != steps:
        return f"stopped at step {step} of {steps}: {run_dir}"
    return f"{'complete' if was_complete else 'trained'}: {run_dir}"


def use_threads(threads: int | None) -> None:
    """Let this process, which is the only rank, compute with a number of threads; with None, as it would anyway."""
    if threads is not None:
        torch.set_num_threads(threads)


def _is_complete(config: RunConfig) -> bool:
    """Return whether a run has an intact checkpoint of its last step."""
    last, steps = folder_of(Path(config.run.out), config.train.steps), config.train.steps
    return has_checkpoint(Path(config.run.out), steps) and damage(last) is None


def run_rank(config: RunConfig, resume: bool, used_hours: float = 0.0) -> None:
    """Train on this rank; raises HydrazeroError on every rank that a fault concerns.

    `used_hours` of `train.max_hours` have been used by earlier attempts.
    """

    run_dir = Path(config.run.out)

    def job() -> None:
        # All ranks check before any continues: rank 0 would create the folder that must not exist for the others.
        manifests = distributed.from_first(lambda: task_manifests(config))
        checked = distributed.together(lambda: check_run(config, resume, manifests=manifests))
        with _alone_in(run_dir) as warnings:
            # Another process may have used the folder between the check and the lock.
            distributed.together(lambda: check_run_folder(run_dir, resume) if distributed.rank() == 0 else None)
            _train(config, resume, replace(checked, warnings=[*warnings, *checked.warnings]), used_hours)

    distributed.within_ranks(config.train.timeout_minutes, job)


@contextlib.contextmanager
def _alone_in(run_dir: Path) -> Iterator[list[str]]:
    """Hold the lock of the run folder on rank 0; yield a warning if its file system has none. Called on every rank."""
    with contextlib.ExitStack() as held:
        lock = folder_in_use(run_dir, RUN_LOCK, "run folder") if distributed.rank() == 0 else contextlib.nullcontext()
        warning = distributed.together(lambda: held.enter_context(lock))
        yield [warning] if warning else []


def _train(config: RunConfig, resume: bool, checked: CheckedRun, used_hours: float) -> None:
    checked, heads = with_heads(config, checked, resume)
    engine = engine_of(config, checked)
    trained = engine.module
    described, run_dir = trained.model.facts(), Path(config.run.out)
    average = weight_average_of(engine, config.train.average)
    state: dict[str, Any] = {"step": 0, "stream": None}
    said: list[str] = []
    changes: list[SettingChange] = []
    if checked.start is not None:
        said = [*started_from(config.tasks, checked.start, checked.rows, config.run.start_from), *heads]
    said += [sentence] if (sentence := frozen(trained)) is not None else []
    if resume:
        check_same_model(run_dir, described)
        folder, damaged = _checkpoint_to_resume(run_dir)
        said += damaged
        configured = group_settings(engine)
        if folder is not None and step_of(folder) == (steps := config.train.steps):
            distributed.together(lambda: read_state(folder) if distributed.rank() == 0 else None)
            if distributed.rank() == 0:
                for sentence in damaged:
                    echo(sentence, err=True)
                echo(
                    f"the run is complete ({steps} of {steps} steps); set train.steps higher to continue it.", err=True
                )
            return
        if folder is not None:
            state = load_checkpoint(engine, folder, average)
            said.append(resumed_from(state, engine))
        changes = distributed.from_first(lambda: changes_since(run_dir, state, checked.settings))
        if folder is not None:
            with restoring(folder):
                apply_settings(engine, configured, [change.key for change in changes])
                said += sentences_on(changes, state)

    log = RunLog(run_dir, config.train.steps, start=state["step"], settings=hyperparameters(config.model_dump()))
    stop = StopRequest(config.train.max_hours, used_hours, config.train.budget_seconds)
    parts = run_parts(config, checked, engine, average, stop=stop, log=log, stream_state=state["stream"])

    tables = {**config.model_dump(), "deepspeed": checked.ds_config}

    def note_start() -> None:
        if resume:
            truncate_metrics(run_dir, state["step"])
            add_resume(run_dir, tables, changes, step=state["step"], ranks=distributed.ranks())
        else:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json(run_dir / MODEL_FACTS_NAME, described)
            write_json(run_dir / RUN_NAME, run_record(tables, distributed.ranks()))

    # Only now, after everything has started, does the run folder record a run or a further resume.
    distributed.together(lambda: writing(run_dir, note_start) if distributed.rank() == 0 else None)
    with log, stop:
        for sentence in [*said, *checked.warnings]:
            log.say(sentence)
        if resume and state["step"] == 0:
            log.say(f"{run_dir} holds no checkpoint: the run starts again from step 0.")
        if config.train.compile:
            log.say(compile_steps(engine))
        trainer = Trainer(run_dir, config.train, parts)
        if state["step"]:
            with restoring(folder_of(run_dir, state["step"])):
                trainer.load(state, starts_anew(changes))
        trainer.train()


def _checkpoint_to_resume(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the last complete checkpoint, or None if there is none, and sentences about damaged ones.

    Only rank 0 reads checkpoints, since it renames damaged ones; the result is the same on every rank.
    """
    found: tuple[Path | None, list[str]] = distributed.together(
        lambda: usable_checkpoint(run_dir) if distributed.rank() == 0 else (None, [])
    )
    chosen: tuple[Path | None, list[str]] = distributed.gather_objects(found)[0]
    return chosen


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value of the run file."
)
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint of the run.")
@click.option(
    "--dry-run", "rehearsal", flag_value="dry-run", help="Check everything and do two steps without writing anything."
)
@click.option("--profile", "rehearsal", flag_value="profile", help="Profile a few steps without starting the run.")
@click.option("--measure", "rehearsal", flag_value="measure", hidden=True)  # `hydrazero init` wants the time of steps
@click.option("--local_rank", "--local-rank", default=None, type=int, hidden=True)  # DeepSpeed's launcher passes it
@click.option("--launched-by", default=None, type=int, hidden=True)  # the process id of `hydrazero train`
@click.option("--used-hours", default=0.0, hidden=True)  # by earlier attempts
def main(
    run_file: Path,
    overrides: Sequence[str],
    resume: bool,
    rehearsal: str | None,
    local_rank: int | None,
    launched_by: int | None,
    used_hours: float,
) -> None:
    """Train one rank of RUN_FILE; start it with deepspeed, srun, mpirun, or alone."""
    if launched_by is not None:
        end_with_parent(launched_by, FAILED)

    def job() -> None:
        config = load_run_config(run_file, overrides)
        if rehearsal is None:
            run_rank(config, resume, used_hours)
        else:
            rehearse(rehearsal, config, resume)

    def prints(error: HydrazeroError) -> bool:
        # `hydrazero train` sees which rank has ended, and reports it. The process group is gone by now, or never
        # existed, so the rank is the launcher's.
        is_reported = launched_by is not None and isinstance(error, LostContactError)
        return not is_reported and (launcher_rank() == 0 or not error.on_every_rank)

    end_process_after(job, prints=prints)


if __name__ == "__main__":
    main()
