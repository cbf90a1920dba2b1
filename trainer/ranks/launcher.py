"""Several ranks on this machine: started, watched, and started again from the last checkpoint if one of them dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import click

from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.ranks.distributed import exit_rank, free_port
from hydrazero.trainer.ranks.exit_status import FAILED, MAY_PASS
from hydrazero.trainer.ranks.stop_signals import SIGNALS
from hydrazero.trainer.records.run_files import RUN_NAME

GRACE = 20.0
"""Seconds that ranks have to end by themselves once one has ended badly."""
POLL = 0.1
PR_SET_PDEATHSIG = 1


class RanksEndedError(HydrazeroError):
    """Ranks have ended for a reason that may pass."""

    exit_status = MAY_PASS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How ranks have ended."""

    status: int
    """0 if all went well, 1 for what would happen again and has been said; anything else may pass."""
    reason: str = ""
    """Which rank has ended how."""


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
    from hydrazero.trainer.checkpoint.folders import latest_checkpoint, step_of
    from hydrazero.trainer.train import check_run, run_rank

    check_run(config, options.resume)
    run_dir = Path(config.run.out)
    if options.ranks == 1 and not options.retries:
        run_rank(config, options.resume)
    else:
        train_ranks(run_file, options.ranks, options.words, run_dir, options.retries)
    step, steps = step_of(latest_checkpoint(run_dir)), config.train.steps
    state = "trained" if step == steps else f"stopped at step {step} of {steps}"
    return f"{state}: {run_dir}"


def train_ranks(run_file: Path, ranks: int, options: Sequence[str], run_dir: Path, retries: int = 0) -> None:
    """Train with `ranks` processes; if some are killed or lost, go on from the last checkpoint, `retries` times.

    Raises RanksEndedError when that was not enough, SystemExit for errors of users, which the ranks have told.
    """
    began = time.monotonic()
    for retry in range(retries + 1):
        used = f"--used-hours={(time.monotonic() - began) / 3600}"  # train.max_hours is of all tries together
        # A first try that died before it had made its folder is simply made again.
        resume = ["--resume"] if retry and (run_dir / RUN_NAME).exists() and "--resume" not in options else []
        with Ranks([*train_command(run_file), *options, *resume, used], ranks) as running:
            outcome = running.wait()
        if outcome.status == 0:
            return
        if outcome.status == 1:
            raise SystemExit(1)
        if running.interrupted:  # again, or before the first step
            raise KeyboardInterrupt
        if running.asked_to_stop or retry == retries:
            break
        again = f"the run starts again from its last checkpoint (retry {retry + 1} of {retries})."
        click.echo(f"{outcome.reason}; {again}", err=True)
    raise RanksEndedError(
        f"{outcome.reason}; --resume goes on from the last checkpoint, or from step 0 if there is none; --retries N "
        "does so unasked."
    )


def train_command(run_file: Path) -> list[str]:
    """Return the command of a rank that this process watches."""
    return [sys.executable, "-m", "hydrazero.trainer.train", str(run_file), f"--launched-by={os.getpid()}"]


class Ranks:
    """Processes of one command on this machine, each told its rank; what they print may go into a file."""

    def __init__(self, command: Sequence[str], ranks: int, output: BinaryIO | None = None) -> None:
        self.command = list(command)
        self.environment = _environment(ranks)
        self.ranks, self.output = ranks, output
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked_to_stop = self.interrupted = False
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Ranks:
        self._exits.callback(self._kill)
        self._exits.enter_context(handling(self._pass_on))
        for rank in range(self.ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = {**self.environment, **own}
            self.processes.append(
                subprocess.Popen(self.command, env=environment, stdout=self.output, stderr=self.output)
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Let the ranks stop with a checkpoint when this process is asked to."""
        self.asked_to_stop, self.interrupted = True, self.interrupted or number == signal.SIGINT
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def wait(self) -> Outcome:
        """Return when all ranks have ended; those that outlive a bad end of another are killed."""
        until: float | None = None
        hung: set[int] = set()
        bad: list[int] = []
        while any(process.poll() is None for process in self.processes):
            for rank, process in enumerate(self.processes):
                if process.returncode and rank not in bad:
                    bad.append(rank)
            if bad and until is None:
                until = time.monotonic() + GRACE
            if until is not None and time.monotonic() > until:
                hung = {rank for rank, process in enumerate(self.processes) if process.poll() is None}
                self._kill()
            time.sleep(POLL)
        bad += [rank for rank, process in enumerate(self.processes) if process.returncode and rank not in bad]
        return outcome_of([(rank, self.processes[rank].returncode) for rank in bad], hung)


def outcome_of(bad: Sequence[tuple[int, int]], hung: set[int]) -> Outcome:
    """Judge the ranks that ended badly, as (rank, exit status), the first one first; `hung` had to be killed."""
    if not bad:
        return Outcome(status=0)
    if any(status == 1 for _, status in bad):
        return Outcome(status=1)
    by_themselves = [(rank, status) for rank, status in bad if rank not in hung]
    for rank, status in by_themselves:
        if status < 0:
            name = signal.Signals(-status).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return Outcome(status=MAY_PASS, reason=f"rank {rank} was killed by {name}{hint}")
    for rank, status in by_themselves:
        if status != MAY_PASS:
            return Outcome(status=MAY_PASS, reason=f"rank {rank} ended with exit status {status}")
    if hung:
        return Outcome(status=MAY_PASS, reason=f"rank {min(hung)} did not answer for train.timeout_minutes")
    return Outcome(status=MAY_PASS, reason=f"rank {by_themselves[0][0]} has lost contact with the others")


def _environment(ranks: int) -> dict[str, str]:
    """Return what tells ranks how many they are and where they meet; raises ConfigError if there are too few GPUs."""
    from hydrazero.trainer.ranks.device import device_kind, gpu_module

    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(cores // ranks, 1)))
    environment.setdefault("DS_ACCELERATOR", device_kind())
    if (gpu := gpu_module()) is not None and gpu.device_count() < ranks:
        raise ConfigError(f"--ranks is {ranks}, but this machine has {gpu.device_count()} GPUs; use as many.")
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    return {**environment, **meet, "LOCAL_SIZE": str(ranks)}


def end_with(parent: int) -> None:
    """Let this rank be killed when the process that watches it is: two runs in one folder would spoil each other."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        exit_rank(FAILED)


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a handler have the signals that ask to stop, for a while."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
