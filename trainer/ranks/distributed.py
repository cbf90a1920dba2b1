"""The process group of a run's ranks: joining it, collective operations, and errors that concern all ranks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hydrazero.shards.device import BACKENDS, device_kind, device_of
from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.shards.launcher_variables import (
    TORCH_VARIABLES,
    LauncherRank,
    is_ready_for_torch,
    is_under_mpi,
    launcher_ranks,
    local_rank,
    mpi_sizes,
)
from hydrazero.trainer.ranks.exit_status import MAY_PASS

T = TypeVar("T")


def quiet_deepspeed() -> None:
    """Import DeepSpeed without its messages on missing accelerators and on schedules that have not started yet.

    On CPUs, DeepSpeed would also compile an all-reduce through shared memory at the first start, which only its
    inference engine uses. That takes 45 s, and a killed build leaves a lock behind; here it is marked as unsupported.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_kind())
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class LostContactError(HydrazeroError):
    """Another rank, or a data-loading worker, has ended or does not answer."""

    on_every_rank = False
    exit_status = MAY_PASS


def lost_contact(error: Exception) -> LostContactError | None:
    """Return an error of one sentence if `error` means that another process has ended; None if it does not."""
    reason = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):  # gloo raises plain RuntimeErrors
        return None
    if reason.startswith("DataLoader worker"):
        what = f"its data-loading worker ({reason.rstrip('.')})"
    elif isinstance(error, dist.DistError) or any(word in reason for word in ("gloo", "NCCL")):
        what = "another rank, which " + ("does not answer" if "imed out" in reason else "has ended")
    else:
        return None
    return LostContactError(f"rank {rank()} has lost {what}; --resume continues from the last checkpoint.")


def start_ranks(timeout_minutes: float = 10.0) -> None:
    """Join the process group of the deepspeed launcher, of mpirun or srun (through mpi4py), or a group of one rank.

    A rank that does not answer for `timeout_minutes` counts as lost. Raises ConfigError if mpi4py is needed and
    missing, or if mpirun or srun has started more processes than are in the group: each would train a copy of the run.
    """
    quiet_deepspeed()
    import deepspeed

    # DeepSpeed calls collectives by names that torch has deprecated, which users cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    if not is_ready_for_torch() and is_under_mpi():
        _ask_mpi()
    elif not is_ready_for_torch():
        alone = LauncherRank(rank=0, ranks=1, local=0).variables()
        # Port 0 stands for any free port; no other rank has to know it.
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    _check_started()
    backend = BACKENDS[device_kind()]
    timeout = timedelta(minutes=timeout_minutes)
    # Groups that DeepSpeed makes take the timeout from this module, whatever that of the first group is.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def _ask_mpi() -> None:
    """Set torch's variables to what MPI knows; raises ConfigError if mpi4py cannot be used."""
    import deepspeed

    try:
        deepspeed.comm.mpi_discovery(verbose=False)
    except (ImportError, RuntimeError) as error:  # the latter if there is mpi4py but no MPI library
        raise ConfigError(
            f"ranks of mpirun or srun find each other through mpi4py, which cannot be imported ({error}); install it "
            f"for this machine's MPI, or set {', '.join(TORCH_VARIABLES)} for each rank."
        ) from error


def _check_started() -> None:
    """Raise ConfigError if more processes were started than are in the group; fewer are no fault."""
    size = launcher_ranks()
    for name, started in mpi_sizes().items():
        if started > size:
            for wrong in TORCH_VARIABLES:  # by these each process is rank 0, and all would print the error
                os.environ.pop(wrong)
            raise ConfigError(
                f"{started} processes were started ({name}), but only {size} are in their group; start them with the "
                "mpirun, or srun --mpi, that belongs to the MPI with which mpi4py was built."
            )


def free_port() -> int:
    """Return a free TCP port of this machine."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank() -> int:
    """Return the rank of this process; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Return the number of ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Return the device of this rank."""
    return device_of(local_rank())


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, on the tensor's device; called on every rank."""
    if ranks() == 1:
        return values
    total = values.detach().to(device(), copy=True)  # NCCL sums on the device only
    dist.all_reduce(total)
    return total.to(values.device)


def max_over_ranks(value: float) -> float:
    """Return the largest of all ranks' values; called on every rank."""
    if ranks() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks (plain Python types) in the order of ranks; called on every rank."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def gather_to_first(value: Any) -> list[Any]:
    """Return the values of all ranks on rank 0, and an empty list elsewhere, to save memory; called on every rank."""
    if ranks() == 1:
        return [value]
    values: list[Any] | None = [None] * ranks() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def from_first(read: Callable[[], T]) -> T:
    """Return the result of `read` on rank 0 to all ranks, so that one rank instead of thousands reads a file.

    If it raises an error, that is raised on all ranks. Called on every rank.
    """
    if ranks() == 1:
        return read()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = read()
        except Exception as error:  # of any type, since the other ranks wait for the outcome
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def fail_together(error: HydrazeroError | None) -> None:
    """Raise the first error of any rank on all ranks, so that none waits for another; called on every rank."""
    errors = [each for each in gather_objects(error) if each is not None]
    if errors:
        raise errors[0]


def together(check: Callable[[], T]) -> T:
    """Return the result of `check` on this rank; if it raises a HydrazeroError on any rank, raise that on all.

    Called on every rank.
    """
    error = None
    try:
        result = check()
    except HydrazeroError as met:
        error = met
    fail_together(error)
    return result


def wait_for_all() -> None:
    """Wait until every rank has called this."""
    if ranks() > 1:
        dist.barrier()


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        import deepspeed

        # After torch's own function, DeepSpeed would still refer to groups that no longer exist.
        deepspeed.comm.destroy_process_group()


def within_ranks(timeout_minutes: float, job: Callable[[], None]) -> None:
    """Do a job on this rank within the process group of all ranks; raises what the job raises."""
    start_ranks(timeout_minutes)
    try:
        job()
        wait_for_all()  # a rank that leaves early would close connections that others still use
    except Exception as error:
        lost = lost_contact(error)
        if lost is None:
            stop_ranks()
            raise
        raise lost from error  # without leaving the group, since that needs the other ranks
    stop_ranks()
