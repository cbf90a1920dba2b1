"""Ranks with gloo for tests, as processes that are forked from one that has imported everything.

The imports of a rank take four seconds of a core; forking takes a few hundredths of a second. Tests of `hydrazero
train`, deepspeed and mpirun start ranks as users do, each as a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch

from hydrazero.shards.launcher_variables import TORCH_VARIABLES
from hydrazero.trainer.ranks.distributed import free_port

TESTS = Path(__file__).parents[1]
PROGRAMS = TESTS / "ranks"
"""Scripts that ranks run."""
TRAIN = TESTS.parent / "trainer" / "train.py"
"""The script of `python -m hydrazero.trainer.train`."""
# One compiler thread avoids the compiler's pool of processes, each of which would import PyTorch.
SETTINGS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "deepspeed.runtime.engine",
        "hydrazero.shards.stream.stream",
        "hydrazero.trainer.rehearsal.rehearse",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "tensorboard.plugins.hparams.summary",
        "torch._inductor.compile_fx",
        "torch.utils.cpp_extension",
        "torch.utils.tensorboard",
    ]
)


class Rank:
    """A process that runs a script, with those methods of Popen that tests use."""

    def __init__(self, command: Sequence[object], environment: dict[str, str], output: Path) -> None:
        words = [str(part) for part in command]
        with mock.patch.dict(os.environ, SETTINGS):
            forkserver.ensure_running()
        self._process = FORKS.Process(target=_run, args=(words, environment, str(output)))
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit status, the negative number of the signal that ended the process, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; raise TimeoutError if the process still runs after `timeout` seconds."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise TimeoutError(f"process {self._process.pid} still runs after {timeout} s")
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it runs."""
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill the process if it runs."""
        self._process.kill()


def _run(command: list[str], environment: dict[str, str], output: str) -> None:
    """Run a command in this process, as a new process with this environment would, except for its imports."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # the process from which this one was forked may have other settings
    sys.path[:0] = [str(TESTS / folder) for folder in ("", "support", "trainer", "ranks")]
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def without_launcher() -> dict[str, str]:
    """Return the environment of a user's shell, without the variables that a run in this process may have set."""
    return {key: value for key, value in os.environ.items() if key not in TORCH_VARIABLES} | SETTINGS


@contextmanager
def started_ranks(commands: Sequence[Sequence[object]], output: Path) -> Iterator[list[Rank]]:
    """Start a rank per command, in one process group; at the end kill those that still run."""
    meet = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = without_launcher() | meet
    ranks = []
    try:
        for rank, command in enumerate(commands):
            ranks.append(Rank(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.wait()


def finished_ranks(command: Sequence[object], ranks: int, timeout: float = 300) -> tuple[list[int], str]:
    """Run a script on `ranks` processes to their ends; return their exit statuses and output."""
    until = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with started_ranks([command] * ranks, output) as processes:
            statuses = [process.wait(max(until - time.monotonic(), 0.0)) for process in processes]
        return statuses, output.read_text()


def finished_alone(command: Sequence[object], timeout: float = 300, **variables: str) -> tuple[int, str]:
    """Run a script without a launcher's variables; return its exit status and output."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = Rank(command, without_launcher() | variables, output)
        try:
            return process.wait(timeout), output.read_text()
        finally:
            process.kill()


def run_ranks(script: str, ranks: int, arguments: Sequence[object], timeout: float = 300) -> None:
    """Run `tests/ranks/<script>` on `ranks` processes; raise RuntimeError with their output if one fails."""
    statuses, output = finished_ranks([PROGRAMS / script, *arguments], ranks, timeout)
    if any(statuses):
        raise RuntimeError(f"ranks ended with {statuses}:\n{output}")
