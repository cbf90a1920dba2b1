"""Ranks: finding out who they are, and sums over them."""

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
    """Import DeepSpeed without what it says of accelerators that are absent and schedules that have yet to start.

    On CPUs it would also compile an all-reduce through shared memory at the first start (45 s, with a lock that a
    killed build leaves behind), which serves its inference engine alone; it is told that this machine cannot have it.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_kind())
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class LostContactError(HydrazeroError):
    """Another rank, or a process that reads data, has ended or does not answer."""

    on_every_rank = False
    exit_status = MAY_PASS


def lost_contact(error: Exception) -> LostContactError | None:
    """Return what a user is told of an error if it means that another process is no more, None if it does not."""
    reason = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):  # gloo raises plain ones
        return None
    if reason.startswith("DataLoader worker"):
        what = f"its worker that reads data ({reason.rstrip('.')})"
    elif isinstance(error, dist.DistError) or any(word in reason for word in ("gloo", "NCCL")):
        what = "another rank, which " + ("does not answer" if "imed out" in reason else "has ended")
    else:
        return None
    return LostContactError(f"rank {rank()} has lost {what}; --resume goes on from the last checkpoint.")


def start_ranks(timeout_minutes: float = 10.0) -> None:
    """Join the process group: of the deepspeed launcher, of mpirun or srun (through mpi4py), or a group of one.

    A rank that does not answer for `timeout_minutes` is given up. Raises ConfigError if mpi4py is needed and missing,
    or if mpirun or srun have started more processes than would find each other: each would train a copy of the run.
    """
    quiet_deepspeed()
    import deepspeed

    # DeepSpeed calls collectives by names that torch has deprecated: nothing that a user of ours can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    if not is_ready_for_torch() and is_under_mpi():
        _ask_mpi()
    elif not is_ready_for_torch():
        alone = LauncherRank(rank=0, ranks=1, local=0).variables()
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    _check_started()
    backend = BACKENDS[device_kind()]
    timeout = timedelta(minutes=timeout_minutes)
    # Groups that DeepSpeed makes take this value of the module, whatever the first group was given.
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
    """Raise ConfigError if more processes were started than find each other; more ranks than were told are fine."""
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
    """Return a TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank() -> int:
    """Rank of this process; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Number of ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Device that this rank computes on."""
    return device_of(local_rank())


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, the same on each, where the tensor was."""
    if ranks() == 1:
        return values
    total = values.detach().to(device(), copy=True)  # NCCL sums on the device alone
    dist.all_reduce(total)
    return total.to(values.device)


def max_over_ranks(value: float) -> float:
    """Return the largest of all ranks' values, the same on each."""
    if ranks() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def gather_objects(value: Any) -> list[Any]:
    """Return everybody's value of plain Python types, in the order of ranks."""
    if ranks() == 1:
        return [value]
    everybody: list[Any] = [None] * ranks()
    dist.all_gather_object(everybody, value)
    return everybody


def gather_to_first(value: Any) -> list[Any]:
    """Return everybody's value on rank 0, in the order of ranks, and nothing elsewhere, where it would fill memory."""
    if ranks() == 1:
        return [value]
    everybody: list[Any] | None = [None] * ranks() if rank() == 0 else None
    dist.gather_object(value, everybody)
    return everybody or []


def from_first(read: Callable[[], T]) -> T:
    """Return what `read` gives on rank 0, on all ranks: one reads a file, and thousands do not ask the disk for it.

    Raises on all what it raises there.
    """
    if ranks() == 1:
        return read()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = read()
        except Exception as met:  # whatever it is: the others wait to be told
            told[1] = met
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    result: T = told[0]
    return result


def fail_together(error: HydrazeroError | None) -> None:
    """Raise the first error that any rank has met, on all of them, so that it is said once and nobody is waited for."""
    met = [each for each in gather_objects(error) if each is not None]
    if met:
        raise met[0]


def together(check: Callable[[], T]) -> T:
    """Return what `check` gives on this rank, once it has passed on all; raises on all what it raises on any."""
    error = None
    try:
        result = check()
    except HydrazeroError as met:
        error = met
    fail_together(error)
    return result


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if ranks() > 1:
        dist.barrier()


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed groups that are no more


def within_ranks(timeout_minutes: float, job: Callable[[], None]) -> None:
    """Do a job on this rank within the group of all of them; raises what the job raises."""

    start_ranks(timeout_minutes)
    try:
        job()
        wait_for_all()  # a rank that left early would tear down connections that others still use
    except Exception as error:
        lost = lost_contact(error)
        if lost is None:
            stop_ranks()
            raise
        raise lost from error  # the group is left as it is: to leave it properly takes the others too
    stop_ranks()
