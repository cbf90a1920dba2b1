"""A search as one command runs it: checks, and worker processes that train trials."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.config.tasks import task_manifests
from hydrazero.trainer.ranks.launcher import handling
from hydrazero.trainer.records.run_files import RUN_NAME, read_run_json
from hydrazero.trainer.search.journal import Journal, begin_search
from hydrazero.trainer.search.objective import trivial_errors
from hydrazero.trainer.search.space import WANTED_STRUCTURES, SearchSpace, require_optuna
from hydrazero.trainer.search.space_check import check_space
from hydrazero.trainer.search.trial_rows import TrialRow
from hydrazero.trainer.search.trial_settings import BATCH_KEYS, toml_value
from hydrazero.trainer.search.worker import STOPPED


def begin(path: Path) -> Journal:
    """Check a space file, and begin or continue its search; raise HydrazeroError for files or data with errors."""
    require_optuna()
    checked = check_space(path)
    try:
        base = load_run_config(checked.space.search.run)
        skip_damaged = base.data.on_bad_shard == "skip"
        trivial = trivial_errors(base.tasks, task_manifests(base), base.loss, skip_damaged=skip_damaged)
    except HydrazeroError as error:
        raise ConfigError(f"{path}: search.run: {error}") from error
    return begin_search(checked.space, checked.text, trivial)


def run_workers(journal: Journal, trials: int, workers: int) -> list[int]:
    """Let workers train trials until `trials` are complete, and return the exit statuses of the workers.

    Ctrl-C and the signals with which schedulers stop jobs are passed on: runs end with a checkpoint, and their trials
    are resumed when the search continues. If this process ends for any reason, its workers end too.
    """
    command = [sys.executable, "-m", "hydrazero.trainer.search.worker", str(journal.out), f"--trials={trials}"]
    command.append(f"--launched-by={os.getpid()}")
    environments = [_environment(journal.space, number, workers) for number in range(workers)]
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with handling(pass_on):
        try:
            processes += [subprocess.Popen(command, env=environment) for environment in environments]
            return [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()


def check_ended(journal: Journal, trials: int, statuses: Sequence[int]) -> None:
    """Raise HydrazeroError with the reason if the search ended before `trials` were complete."""
    done = len(journal.of_state("COMPLETE", "PRUNED"))
    if all(status == 0 for status in statuses) or done >= trials:
        return
    if any(status == 1 for status in statuses):
        raise SystemExit(1)  # the worker has printed the error
    bad = next((s for s in statuses if s not in (0, STOPPED, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT)), None)
    what = "the search was stopped" if bad is None else f"a worker has ended with exit status {bad}"
    raise HydrazeroError(f"{what} after {done} of {trials} trials; the same command continues it.")


def _environment(space: SearchSpace, worker: int, workers: int) -> dict[str, str]:
    """Return a worker's environment with its part of the cores or GPUs; raise ConfigError if there are too few GPUs."""
    from hydrazero.shards.device import VISIBLE, device_kind, gpu_module

    environment, ranks = dict(os.environ), space.search.ranks
    environment.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // (workers * ranks), 1)))
    if (gpu := gpu_module()) is not None and workers > 1:
        variable = VISIBLE[device_kind()]
        visible = os.environ.get(variable, "")
        gpus = visible.split(",") if visible else [str(n) for n in range(gpu.device_count())]
        if len(gpus) < workers * ranks:
            raise ConfigError(
                f"--workers {workers} with search.ranks = {ranks} need {workers * ranks} GPUs, but there are "
                f"only {len(gpus)}; use fewer workers, since trials that share a GPU cannot be compared by time."
            )
        environment[variable] = ",".join(gpus[worker * ranks : (worker + 1) * ranks])
    return environment


def command_of(journal: Journal, row: TrialRow) -> str:
    """Return the command that trains with a trial's values and the schedule and number of steps of the run file.

    The batch is the one that the trial recorded; reports do not read shards, whose location is that of a run file which
    others may have written.
    """
    overrides = [f"{key}={toml_value(value)}" for key, value in row.values.items() if key != WANTED_STRUCTURES]
    if WANTED_STRUCTURES in row.values:
        batch = read_run_json(journal.run_dir(row.number), RUN_NAME).get("batch", {})
        overrides += [f"batch.{key}={int(batch[key])}" for key in BATCH_KEYS if key in batch]
    words = [word for each in overrides for word in ("--set", each)]
    return shlex.join(["hydrazero", "train", journal.space.search.run, *words])
