"""The environment variables in which launchers tell a process its rank; no other module reads them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torch needs to form a group of ranks: deepspeed and torchrun set them all."""
FAMILIES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""Rank, number of ranks, and rank on the node: of deepspeed and torchrun, Open MPI, the mpiexec of PALS, that of MPICH
and Intel MPI, and srun. Slurm's come last, since every process in a Slurm job has them."""
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Number of processes that mpirun or srun has started."""
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
"""Rank of a process; the first one that is set counts."""


@dataclass(frozen=True, kw_only=True)
class LauncherRank:
    """The rank of a process, as its launcher has set it."""

    rank: int
    ranks: int
    """Number of ranks."""
    local: int
    """Rank among those of the same node."""

    def variables(self) -> dict[str, str]:
        """Return the variables in which torch reads the rank."""
        return {"RANK": str(self.rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(self.local)}


def launcher_rank_in(environment: Mapping[str, str]) -> LauncherRank | None:
    """Return the rank that a launcher has put into an environment; None unless it has set all three numbers."""
    for names in FAMILIES:
        values = [environment.get(name, "") for name in names]
        if all(value.isdigit() for value in values):
            rank, ranks, local = map(int, values)
            return LauncherRank(rank=rank, ranks=ranks, local=local)
    return None


def launcher_rank() -> int:
    """Return the rank that the launcher gave this process, known before it joins a group; 0 without a launcher."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


def launcher_ranks() -> int:
    """Return the number of processes that the launcher has started; 1 without a launcher."""
    sizes = (os.environ.get(name, "") for name in ("WORLD_SIZE", *MPI_SIZES))
    return next((int(size) for size in sizes if size.isdigit()), 1)


def local_rank() -> int:
    """Return this process's rank among those of its node, as torch reads it; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_ready_for_torch() -> bool:
    """Return whether a launcher has set all that torch needs to form a group of ranks."""
    return all(name in os.environ for name in TORCH_VARIABLES)


def is_under_mpi() -> bool:
    """Return whether mpirun or srun has started this process."""
    return any(name in os.environ for name in (*MPI_SIZES, "PMIX_RANK"))


def mpi_sizes() -> dict[str, int]:
    """Return the number of processes by each variable in which mpirun or srun has set it."""
    return {name: int(os.environ[name]) for name in MPI_SIZES if os.environ.get(name, "").isdigit()}


def forget_launcher() -> None:
    """Remove the rank of this process from its environment, so that processes that it starts do not inherit it."""
    for name in (*RANKS, *MPI_SIZES):
        os.environ.pop(name, None)


def node_name() -> str:
    """Return the name of this node: Slurm's name for it, or else the host's name without its domain."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
