"""One rank of a training run: `deepspeed --num_gpus N --module hydrazero.trainer.train RUN.toml`, srun, or mpirun."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.files import write_json
from hydrazero.trainer.checkpoint.folders import latest_checkpoint, step_of, usable_checkpoint
from hydrazero.trainer.checkpoint.save_load import load_checkpoint, resumed_from
from hydrazero.trainer.config.run_file import RunConfig, load_run_config
from hydrazero.trainer.config.tasks import task_manifests
from hydrazero.trainer.engine.parameter_groups import frozen
from hydrazero.trainer.loop import Trainer
from hydrazero.trainer.ranks import distributed
from hydrazero.trainer.ranks.distributed import LostContactError, exit_rank, launcher_rank
from hydrazero.trainer.ranks.exit_status import FAILED
from hydrazero.trainer.ranks.launcher import train_ranks
from hydrazero.trainer.ranks.processes import end_with
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, RUN_NAME, truncate_metrics, writing
from hydrazero.trainer.records.run_log import RunLog
from hydrazero.trainer.records.run_record import add_resume, run_record
from hydrazero.trainer.rehearsal.rehearse import rehearse
from hydrazero.trainer.setup import (
    CheckedRun,
    check_run,
    check_same_model,
    compile_steps,
    engine_of,
    run_parts,
    weight_average_of,
    with_heads,
)
from hydrazero.trainer.start.head_starts import started_from


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run is started on this machine."""

    ranks: int
    words: Sequence[str] = ()
    """Options that each rank is given."""
    resume: bool = False
    retries: int = 0


def train_here(run_file: Path, config: RunConfig, options: TrainOptions) -> str:
    """Train a run file on this machine, in this process where one rank is enough; returns a sentence on how it went."""
    check_run(config, options.resume)
    run_dir = Path(config.run.out)
    if options.ranks == 1 and not options.retries:
        run_rank(config, options.resume)
    else:
        train_ranks(run_file, options.ranks, options.words, run_dir / RUN_NAME, options.retries)
    step, steps = step_of(latest_checkpoint(run_dir)), config.train.steps
    state = "trained" if step == steps else f"stopped at step {step} of {steps}"
    return f"{state}: {run_dir}"


def run_rank(config: RunConfig, resume: bool, used_hours: float = 0.0) -> None:
    """Train on this rank; raises HydrazeroError on every rank that a fault concerns.

    Of `train.max_hours` some may be over, by tries before this one.
    """

    def job() -> None:
        # Nobody goes on before all have checked: rank 0 would make the folder that the others want to see absent.
        manifests = distributed.from_first(lambda: task_manifests(config))
        checked = distributed.together(lambda: check_run(config, resume, manifests=manifests))
        _train(config, resume, checked, used_hours)

    distributed.within_ranks(config.train.timeout_minutes, job)


def _train(config: RunConfig, resume: bool, checked: CheckedRun, used_hours: float) -> None:
    checked, heads = with_heads(config, checked, resume)
    engine = engine_of(config, checked)
    trained = engine.module
    described, run_dir = trained.model.facts(), Path(config.run.out)
    average = weight_average_of(engine, config.train.average)
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

    log = RunLog(config, state["step"])
    stop = StopRequest(config.train.max_hours, used_hours, config.train.budget_seconds)
    parts = run_parts(config, checked, engine, average, stop=stop, log=log, stream_state=state["stream"])

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
    with log, stop:
        for sentence in [*said, *checked.warnings]:
            log.say(sentence)
        if resume and state["step"] == 0:
            log.say(f"{run_dir} holds no checkpoint: the run starts again from step 0.")
        if config.train.compile:
            log.say(compile_steps(engine))
        trainer = Trainer(config, parts)
        if state["step"]:
            trainer.load(state)
        trainer.train()


def _checkpoint_to_resume(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the last whole checkpoint, None if there is none yet, and sentences on damaged ones; the same everywhere.

    Only rank 0 looks: it renames what is damaged.
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
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the run.")
@click.option("--dry-run", "rehearsal", flag_value="dry-run", help="Check everything and do two steps; write nothing.")
@click.option("--profile", "rehearsal", flag_value="profile", help="Profile a few steps, without the run itself.")
@click.option("--measure", "rehearsal", flag_value="measure", hidden=True)  # `hydrazero init` wants the time of steps
@click.option("--local_rank", "--local-rank", default=None, type=int, hidden=True)  # DeepSpeed's launcher passes it
@click.option("--launched-by", default=None, type=int, hidden=True)  # the process id of `hydrazero train`
@click.option("--used-hours", default=0.0, hidden=True)  # by its tries before this one
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
        end_with(launched_by)
    try:
        config = load_run_config(run_file, overrides)
        if rehearsal is None:
            run_rank(config, resume, used_hours)
        else:
            rehearse(rehearsal, config, resume)
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
