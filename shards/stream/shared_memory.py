"""Shared memory, through which worker processes pass batches: whether there is enough, and one sentence if not.

Containers often have 64 MB of it. Where it is used up, PyTorch fails in a thread of the worker, which prints a
traceback and passes nothing on, or the kernel ends the worker (SIGBUS): a process that waits for a batch would wait
forever.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.stream.batch_buffer import BY_VALUE, BatchBuffer, by_value

FOLDER = "/dev/shm"
"""Where Linux keeps shared memory."""
POLL = 5.0
"""Seconds after which a process that waits for a batch looks whether it is to stop."""
PATIENCE = 15.0
"""Seconds that it still waits for a batch, counted from the last one, if it is to stop."""
STUCK = 600.0
"""Seconds without a batch after which workers that have done next to nothing meanwhile are given up."""
NEXT_TO_NOTHING = 1.0
"""Processor time in seconds that a worker which is stuck may still take."""
BUS_ERROR = "Bus error"
"""Words of the error of a DataLoader whose worker the kernel has ended for lack of shared memory."""
TIMED_OUT = "DataLoader timed out"
"""Beginning of the error of a DataLoader that has waited for its `timeout`."""
MAY_PASS = 75
"""Exit status after a request to stop: another attempt may come to its end (EX_TEMPFAIL of sysexits.h)."""


def too_small(needed: int, remedy: str) -> ConfigError:
    """Return the error for batches of `needed` bytes in all; `remedy` is the setting by which no process reads."""
    try:
        status = os.statvfs(FOLDER)
        held = f"{FOLDER} has {status.f_bavail * status.f_frsize / 1e6:,.0f} MB free of {needed / 1e6:,.0f} MB"
    except OSError:
        held = f"there is no {FOLDER} for {needed / 1e6:,.0f} MB"
    return ConfigError(
        f"shared memory is too small for the batches that worker processes pass on: {held}; set {remedy}, or give the "
        "container more (docker run --shm-size=8g)."
    )


def check_shared_memory(needed: int, remedy: str) -> None:
    """Raise ConfigError if batches of `needed` bytes in all, which exist at the same time, do not fit."""
    try:
        status = os.statvfs(FOLDER)
    except OSError:
        return  # another system, which keeps shared memory elsewhere
    if status.f_bavail * status.f_frsize < needed:
        raise too_small(needed, remedy)


def ready_to_pass(buffer: BatchBuffer, remedy: str) -> BatchBuffer:
    """Return a batch as a worker process passes it on, a large one in shared memory; in any other process, as it is.

    Raises ConfigError if there is no room for it.
    """
    if get_worker_info() is None:
        return buffer
    if buffer.buffer.nbytes <= BY_VALUE:
        return by_value(buffer)
    try:
        torch.as_tensor(buffer.buffer).share_memory_()
    except RuntimeError as error:
        raise too_small(buffer.buffer.nbytes, remedy) from error
    return buffer


def outputs_of(
    loader: DataLoader[Any], needed: int, remedy: str, stop: Callable[[], str] = lambda: ""
) -> Iterator[Any]:
    """Yield what a DataLoader gives, whose `timeout` is POLL if it has workers.

    Raises ConfigError if a worker has ended for lack of shared memory, of which batches need `needed` bytes; or if
    `stop` returns a reason to stop while no batch comes, since a process that waits could not obey it. Raises the
    RuntimeError of a worker that has ended; one that is stuck is killed.
    """
    waiting, waited, idle_since, worked_before = iter(loader), 0.0, 0.0, 0.0
    workers: Sequence[BaseProcess] = getattr(waiting, "_workers", ())
    while True:
        try:
            output = next(waiting)
        except StopIteration:
            return
        except RuntimeError as error:
            ends = [worker.exitcode for worker in workers]
            if BUS_ERROR in str(error) or -signal.SIGBUS in ends:
                raise too_small(needed, remedy) from error
            if not str(error).startswith(TIMED_OUT):
                raise
            waited += POLL
            if (reason := stop()) and waited >= PATIENCE:
                fault = ConfigError(
                    f"{reason} asks to stop, and no batch has come for {waited:.0f} s; the work ends here, without "
                    "the batch that it waits for."
                )
                fault.exit_status = MAY_PASS
                raise fault from error
            worked = _worked(workers)
            if waited == POLL or worked is None or worked - worked_before >= NEXT_TO_NOTHING:
                idle_since, worked_before = waited, worked or 0.0
            elif waited - idle_since >= STUCK:
                _give_up(workers, waited)
            continue
        waited = 0.0
        yield output


def _worked(workers: Sequence[BaseProcess]) -> float | None:
    """Return the processor time of processes in seconds; None where the system does not tell."""
    try:
        stats = [Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split() for worker in workers]
    except OSError:
        return None
    return sum(int(one[11]) + int(one[12]) for one in stats) / os.sysconf("SC_CLK_TCK")


def _give_up(workers: Sequence[BaseProcess], waited: float) -> None:
    """Kill workers that are stuck, since this process would wait for their end, and raise RuntimeError."""
    for end in (BaseProcess.kill, BaseProcess.join):
        for worker in workers:
            with suppress(RuntimeError):  # PyTorch raises one as soon as a worker has ended
                end(worker)
    raise RuntimeError(f"DataLoader worker gave no batch and did nothing for {waited:.0f} s, and was killed")
