"""Processes that share the work of a conversion: one, several on this machine, or the ranks of mpirun and srun."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.launcher_variables import mpi_sizes
from hydrazero.shards.processes import end_with_creator

POLL_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of a conversion."""

    executor: Executor
    count: int

    def run_all(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], watch: Callable[[], None]
    ) -> list[Any]:
        """Return the results of all calls, in their order; `watch` is called from time to time.

        If a call raises, calls that have not begun are cancelled, and the error is raised once the others have ended.
        """
        futures = [self.executor.submit(function, *call) for call in calls]
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
                watch()
                for future in done:
                    future.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        return [future.result() for future in futures]


@contextmanager
def one_worker() -> Iterator[Workers]:
    """Yield one worker, a thread of this process, whose progress the caller can watch."""
    with ThreadPoolExecutor(1) as executor:
        yield Workers(executor=executor, count=1)


@contextmanager
def worker_processes(count: int) -> Iterator[Workers | None]:
    """Yield `count` worker processes.

    Under mpirun or srun, the ranks after the first are the workers; on these, None is yielded after the work is done.
    Raises ConfigError for a count below 1, or if there are MPI ranks but no mpi4py.
    """
    if count < 1:
        raise ConfigError(f"--workers is {count}; it must be at least 1.")
    if (ranks := max(mpi_sizes().values(), default=1)) > 1:
        try:
            from mpi4py import MPI
            from mpi4py.futures import MPICommExecutor
        except ImportError as error:
            raise ConfigError(f"{ranks} MPI ranks need mpi4py, which cannot be loaded ({error}).") from error
        with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
            # Its type stubs do not describe the executor of the first rank.
            pool: Any = executor
            yield None if pool is None else Workers(executor=pool, count=pool.num_workers)
    elif count == 1:
        with one_worker() as worker:
            yield worker
    else:
        # Not forked: the caller may have threads, for example that of a progress bar.
        context = get_context("forkserver")
        with ProcessPoolExecutor(count, mp_context=context, initializer=end_with_creator) as executor:
            yield Workers(executor=executor, count=count)
