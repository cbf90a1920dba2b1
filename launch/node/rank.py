"""Start one rank of a job, watch it, and record how it ends.

    python -m hydrazero.launch.node.rank --attempt DIR COMMAND...

This module is started by srun, mpiexec, mpirun or the deepspeed launcher. It passes the command its rank in the
variables that torch reads (RANK, WORLD_SIZE, LOCAL_RANK); the job sets MASTER_ADDR and MASTER_PORT. Signals and output
are forwarded, and the last lines of output are recorded if the command fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click

from hydrazero.launch.node.records import RECORDS, SIGN_EVERY, add_event, events_of
from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.launcher_variables import LauncherRank, launcher_rank_in, node_name
from hydrazero.shards.processes import kill_with_parent
from hydrazero.shards.text.foreign_text import echo, escaped

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TAIL = 40
"""Number of last lines of output that are recorded."""
DRAIN = 5.0
"""Seconds for which output is awaited after a rank has ended; its child processes may keep the pipe open longer."""


def rank_in(environment: Mapping[str, str]) -> LauncherRank:
    """Return the rank that the launcher has put into an environment; raise ConfigError if there is none."""
    rank = launcher_rank_in(environment)
    if rank is None:
        raise ConfigError(
            "no launcher has given this process a rank; start it with srun, mpiexec, mpirun or deepspeed."
        )
    return rank


class RankWatcher:
    """The process of a rank and its records."""

    def __init__(
        self, attempt: Path, rank: LauncherRank, stop_after: float | None, removed: Sequence[Path] = ()
    ) -> None:
        self.attempt, self.rank, self.node = attempt, rank, node_name()
        self.removed = removed
        """Folders on the node's own disk that are removed after its last rank, while a cancelled job still can."""
        self.stop_at = None if stop_after is None else time.monotonic() + stop_after
        self.tail: deque[bytes] = deque(maxlen=TAIL)
        self.process: subprocess.Popen[bytes] | None = None
        self.early: list[int] = []
        """Signals that arrived before the process was started."""
        self.ended = threading.Event()
        self.warned = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run the command to its end and return its exit status, which is negative if a signal killed it."""
        for number in FORWARDED:
            signal.signal(number, self._forward)
        self._record("start", ranks=self.rank.ranks, local=self.rank.local, pid=os.getpid())
        try:
            # File descriptors stay open, since MPI passes some to its ranks.
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                close_fds=False,
                preexec_fn=kill_with_parent,
            )
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started ({error.strerror}).") from error
        self.process = process
        for early in self.early:
            process.send_signal(early)
        copier = threading.Thread(target=self._copy, daemon=True)
        copier.start()
        threading.Thread(target=self._wait, daemon=True).start()
        self._watch()
        copier.join(DRAIN)
        status = process.returncode
        tail = [line.decode(errors="replace").rstrip() for line in self.tail] if status else []
        self._record("end", status=status, tail=tail)
        self._clean()
        return status

    def _clean(self) -> None:
        try:
            events = [row["event"] for row in events_of(self.attempt, self.node)]
        except OSError:  # the job cleans up later
            return
        if events.count("end") == events.count("start"):
            for folder in self.removed:
                shutil.rmtree(folder, ignore_errors=True)

    def _watch(self) -> None:
        """Return when the process has ended; meanwhile give signs of life, and ask it to stop at the time limit."""
        until_sign = 0.0
        while not self.ended.wait(min(SIGN_EVERY, self._seconds_left())):
            now = time.monotonic()
            if self.stop_at is not None and now >= self.stop_at:
                self.stop_at = None
                self._forward(signal.SIGUSR1, None)
            if self.rank.local == 0 and now >= until_sign:
                until_sign = now + SIGN_EVERY
                self._write("a sign of life", lambda: os.utime(self.attempt / f"{self.node}{RECORDS}"))

    def _seconds_left(self) -> float:
        return SIGN_EVERY if self.stop_at is None else max(self.stop_at - time.monotonic(), 0.0)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._record("told", signal=signal.Signals(number).name)
        if self.process is None:
            self.early.append(number)
        elif self.process.poll() is None:
            self.process.send_signal(number)

    def _copy(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in iter(self.process.stdout.readline, b""):
            self.tail.append(line)
            try:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            except OSError:  # the launcher is gone; the rank continues, and so do its records
                continue

    def _wait(self) -> None:
        assert self.process is not None
        self.process.wait()
        self.ended.set()

    def _record(self, event: str, **facts: object) -> None:
        self._write(
            f"the record '{event}'",
            lambda: add_event(self.attempt, self.node, event, rank=self.rank.rank, **facts),
        )

    def _write(self, what: str, write: Callable[[], None]) -> None:
        """Write something for the post-mortem; if that fails, warn once, since the rank itself matters more."""
        try:
            write()
        except OSError as error:
            if not self.warned:
                self.warned = True
                said = f"{what} of rank {self.rank.rank} on {self.node} cannot be written to {self.attempt}"
                _warn(f"{said} ({error.strerror}); the rank continues, and the post-mortem will know less.")


def _warn(sentence: str) -> None:
    with contextlib.suppress(OSError):  # the launcher may be gone
        echo(f"Warning: {escaped(sentence)}", err=True)


@click.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
@click.option("--attempt", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for records.")
@click.option("--stop-after", type=float, help="Seconds after which the rank is sent SIGUSR1, to stop.")
@click.option("--one-device", is_flag=True, help="The rank sees only its own GPU, as number 0.")
@click.option(
    "--remove",
    "removed",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder to remove after the last rank of the node.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(
    attempt: Path, stop_after: float | None, one_device: bool, removed: tuple[Path, ...], command: tuple[str, ...]
) -> None:
    """Start one rank and record how it ends."""
    try:
        rank = rank_in(os.environ)
        seen = replace(rank, local=0) if one_device else rank
        status = RankWatcher(attempt, rank, stop_after, removed).run(command, {**os.environ, **seen.variables()})
    except HydrazeroError as error:
        echo(f"Error: {escaped(error)}", err=True)
        status = error.exit_status
    sys.stdout.flush()
    os._exit(128 - status if status < 0 else status)  # threads may still be waiting for output


if __name__ == "__main__":
    main()
