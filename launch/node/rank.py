"""Start one rank of a job, watch it, and record how it ends.

    python -m hydrazero.launch.node.rank --attempt DIR COMMAND...

Started by srun, mpiexec, mpirun or the deepspeed launcher, it tells the command its rank in the variables that torch
reads (RANK, WORLD_SIZE, LOCAL_RANK); where ranks meet (MASTER_ADDR, MASTER_PORT) comes from the job. Signals are
passed on. What the command prints is passed on too, and its last lines are kept for when it ends badly.
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

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TAIL = 40
"""Lines."""
DRAIN = 5.0
"""Seconds that a rank's output is waited for once it has ended; children of it may hold it open for longer."""


def rank_in(environment: Mapping[str, str]) -> LauncherRank:
    """Return the rank that the launcher has put into an environment; raises ConfigError if there is none."""
    rank = launcher_rank_in(environment)
    if rank is None:
        raise ConfigError(
            "no launcher has told this process its rank; start it with srun, mpiexec, mpirun or deepspeed."
        )
    return rank


class Watched:
    """A rank's process and its notes."""

    def __init__(
        self, attempt: Path, place: LauncherRank, stop_after: float | None, removed: Sequence[Path] = ()
    ) -> None:
        self.attempt, self.place, self.node = attempt, place, node_name()
        self.removed = removed
        """Folders on the node's own disk that go when its last rank has ended: a cancelled job can do no more then."""
        self.stop_at = None if stop_after is None else time.monotonic() + stop_after
        self.tail: deque[bytes] = deque(maxlen=TAIL)
        self.process: subprocess.Popen[bytes] | None = None
        self.early: list[int] = []
        """Signals that came before there was a process."""
        self.ended = threading.Event()
        self.warned = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run the command to its end; returns its exit status, negative if a signal killed it."""
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        self._note("start", ranks=self.place.ranks, local=self.place.local, pid=os.getpid())
        try:
            # Descriptors stay open: an MPI hands them to its ranks.
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
        self._note("end", status=status, tail=tail)
        self._clean()
        return status

    def _clean(self) -> None:
        try:
            events = [row["event"] for row in events_of(self.attempt, self.node)]
        except OSError:  # the job's own cleaning comes after this one
            return
        if events.count("end") == events.count("start"):
            for folder in self.removed:
                shutil.rmtree(folder, ignore_errors=True)

    def _watch(self) -> None:
        """Return when the process has ended; meanwhile give signs of life, and ask it to stop when it is time."""
        until_sign = 0.0
        while not self.ended.wait(min(SIGN_EVERY, self._seconds_left())):
            now = time.monotonic()
            if self.stop_at is not None and now >= self.stop_at:
                self.stop_at = None
                self._pass_on(signal.SIGUSR1, None)
            if self.place.local == 0 and now >= until_sign:
                until_sign = now + SIGN_EVERY
                self._leave("a sign of life", lambda: os.utime(self.attempt / f"{self.node}{RECORDS}"))

    def _seconds_left(self) -> float:
        return SIGN_EVERY if self.stop_at is None else max(self.stop_at - time.monotonic(), 0.0)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._note("told", signal=signal.Signals(number).name)
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
            except OSError:  # who started this is gone; the rank goes on, and so do the notes
                continue

    def _wait(self) -> None:
        assert self.process is not None
        self.process.wait()
        self.ended.set()

    def _note(self, event: str, **facts: object) -> None:
        self._leave(
            f"the note '{event}'",
            lambda: add_event(self.attempt, self.node, event, rank=self.place.rank, **facts),
        )

    def _leave(self, what: str, leave: Callable[[], None]) -> None:
        """Leave something for the post-mortem; where that cannot be, a warning once: the rank is worth more."""
        try:
            leave()
        except OSError as error:
            if not self.warned:
                self.warned = True
                said = f"{what} of rank {self.place.rank} on {self.node} cannot be left in {self.attempt}"
                _warn(f"{said} ({error.strerror}); the rank goes on, and the post-mortem will know less.")


def _warn(sentence: str) -> None:
    with contextlib.suppress(OSError):  # who started this may be gone
        click.echo(f"Warning: {sentence}", err=True)


@click.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
@click.option("--attempt", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for notes.")
@click.option("--stop-after", type=float, help="Seconds after which the rank is asked to stop, by SIGUSR1.")
@click.option("--one-device", is_flag=True, help="The rank sees its own GPU alone, as number 0.")
@click.option("--remove", "removed", multiple=True, type=click.Path(path_type=Path), help="At the last end here.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(
    attempt: Path, stop_after: float | None, one_device: bool, removed: tuple[Path, ...], command: tuple[str, ...]
) -> None:
    """Start one rank and note how it ends."""
    try:
        place = rank_in(os.environ)
        seen = replace(place, local=0) if one_device else place
        status = Watched(attempt, place, stop_after, removed).run(command, {**os.environ, **seen.variables()})
    except HydrazeroError as error:
        click.echo(f"Error: {error}", err=True)
        status = error.exit_status
    sys.stdout.flush()
    os._exit(128 - status if status < 0 else status)  # threads may still wait for output


if __name__ == "__main__":
    main()
