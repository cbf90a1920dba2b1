"""Starting several ranks on this machine, and starting them again from the last checkpoint if one of them ends."""

from __future__ import annotations

import contextlib
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

from hydrazero.shards.device import device_kind, gpu_module
from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.launcher_variables import LauncherRank
from hydrazero.shards.text.foreign_text import echo
from hydrazero.trainer.ranks.distributed import free_port
from hydrazero.trainer.ranks.exit_status import MAY_PASS
from hydrazero.trainer.ranks.stop_signals import SIGNALS

GRACE = 20.0
"""Seconds that the other ranks have to end by themselves after one has failed."""
END = 60.0
"""Seconds that the other ranks of a run have to end after one has ended well, which it does when all have finished."""
THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Environment variable with the number of threads of a process."""
POLL = 0.1
"""Seconds between looks at the ranks."""


class RanksEndedError(HydrazeroError):
    """Ranks have ended for a reason that may not occur again."""

    exit_status = MAY_PASS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a group of ranks."""

    status: int
    """0 for success, 1 for an error of the user, which has been printed; other reasons may not occur again."""
    reason: str = ""
    """The rank that caused the end, and how it ended, as part of a sentence."""


def train_ranks(
    run_file: Path, ranks: int, options: Sequence[str], record: Path, *, retries: int = 0, threads: int | None = None
) -> None:
    """Train with `ranks` processes; if one is killed or lost, resume from the last checkpoint, at most `retries` times.

    `record` is the file that exists once the run folder holds a run; `threads` is explained at `Ranks`. Raises
    RanksEndedError if the ranks have failed after the last retry, and SystemExit for errors of users, which the ranks
    have printed.
    """
    began = time.monotonic()
    for retry in range(retries + 1):
        used = f"--used-hours={(time.monotonic() - began) / 3600}"  # train.max_hours limits all attempts together
        # A first attempt that ended before it had made its folder is repeated from the start.
        resume = ["--resume"] if retry and record.exists() and "--resume" not in options else []
        with Ranks([*train_command(run_file), *options, *resume, used], ranks, threads=threads) as running:
            outcome = running.wait(end_together=True)
        if outcome.status == 0:
            return
        if outcome.status == 1:
            raise SystemExit(1)
        if running.interrupted:  # a second Ctrl-C, or one before the first step
            raise KeyboardInterrupt
        if running.asked_to_stop or retry == retries:
            break
        again = f"the run is resumed from its last checkpoint (retry {retry + 1} of {retries})."
        echo(f"{outcome.reason}; {again}", err=True)
    raise RanksEndedError(
        f"{outcome.reason}; --resume continues from the last checkpoint, or from step 0 if there is none; --retries N "
        "does so automatically."
    )


def train_command(run_file: Path) -> list[str]:
    """Return the command for a rank of a training run that ends with this process."""
    return [sys.executable, "-m", "hydrazero.trainer.train", str(run_file), f"--launched-by={os.getpid()}"]


class Ranks:
    """Processes of one command on this machine, as ranks of one group; their output goes to `output` if it is given.

    Each has `threads` threads; if that is None, OMP_NUM_THREADS of them, or else its share of the cores.
    """

    def __init__(
        self, command: Sequence[str], ranks: int, output: BinaryIO | None = None, *, threads: int | None = None
    ) -> None:
        self.command = list(command)
        self.environment = _environment(ranks, threads)
        self.ranks, self.output = ranks, output
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked_to_stop = self.interrupted = False
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Ranks:
        self._exits.callback(self._kill)
        self._exits.enter_context(handling(self._pass_on))
        for rank in range(self.ranks):
            own = LauncherRank(rank=rank, ranks=self.ranks, local=rank).variables()
            environment = {**self.environment, **own}
            self.processes.append(
                subprocess.Popen(self.command, env=environment, stdout=self.output, stderr=self.output)
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the ranks, which stop with a checkpoint."""
        self.asked_to_stop, self.interrupted = True, self.interrupted or number == signal.SIGINT
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def wait(self, *, end_together: bool = False) -> Outcome:
        """Wait until all ranks have ended; those that still run some time after another has failed are killed.

        With `end_together`, ranks end well only once all have finished their work. One that still runs long after
        another has ended is killed then, and the work counts as done.
        """
        until: float | None = None
        finished: float | None = None
        hung: set[int] = set()
        bad: list[int] = []
        # A list: each process is asked, whether or not one before it still runs.
        while None in [process.poll() for process in self.processes]:
            for rank, process in enumerate(self.processes):
                if process.returncode and rank not in bad:
                    bad.append(rank)
            if bad and until is None:
                until = time.monotonic() + GRACE
            if end_together and finished is None and any(process.returncode == 0 for process in self.processes):
                finished = time.monotonic() + END
            if not bad and finished is not None and time.monotonic() > finished:
                return self._end_the_rest()
            if until is not None and time.monotonic() > until:
                hung = {rank for rank, process in enumerate(self.processes) if process.poll() is None}
                self._kill()
            time.sleep(POLL)
        bad += [rank for rank, process in enumerate(self.processes) if process.returncode and rank not in bad]
        return outcome_of([(rank, self.processes[rank].returncode) for rank in bad], hung)

    def _end_the_rest(self) -> Outcome:
        """Kill the ranks that do not end although the work of all is done, and say so."""
        statuses = [process.poll() for process in self.processes]
        if bad := [(rank, status) for rank, status in enumerate(statuses) if status]:
            self._kill()
            return outcome_of(bad, set())
        rest = [rank for rank, status in enumerate(statuses) if status is None]
        self._kill()
        for rank in rest:
            echo(f"warning: rank {rank} had finished, but its process did not end and was killed.", err=True)
        return Outcome(status=0)


def outcome_of(bad: Sequence[tuple[int, int]], hung: set[int]) -> Outcome:
    """Return the outcome for the ranks that failed, as (rank, exit status) in their order; `hung` ranks were killed."""
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


def _environment(ranks: int, threads: int | None) -> dict[str, str]:
    """Return the environment variables that all ranks share; raises ConfigError if there are too few GPUs."""
    environment = dict(os.environ)
    if threads is not None:
        environment[THREADS_VARIABLE] = str(threads)
    environment.setdefault(THREADS_VARIABLE, str(max(len(os.sched_getaffinity(0)) // ranks, 1)))
    environment.setdefault("DS_ACCELERATOR", device_kind())
    if (gpu := gpu_module()) is not None and gpu.device_count() < ranks:
        raise ConfigError(
            f"--ranks is {ranks}, but this machine has {gpu.device_count()} GPUs; use at most one rank for each."
        )
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {**environment, **meeting, "LOCAL_SIZE": str(ranks)}


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Use a handler for the signals that ask to stop, within a `with` block."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
