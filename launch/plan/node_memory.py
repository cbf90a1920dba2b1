"""What a node's main memory holds while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hydrazero.launch.plan.data import TaskData
from hydrazero.trainer.cost.device_memory import DieMemory

PROCESS = 0.5e9
"""Bytes of a rank's process, and of each of its workers: Python and its modules (measured: 0.58 and 0.46 GB). Workers
are forked and share most of it at first, but less and less, since counting references writes to it."""
GPU_PROCESS = 1.0e9
"""Bytes that CUDA or ROCm keep in a rank's process (estimate)."""
BYTES_OF_BLOCK = 155.0
"""Of a manifest in a process: 230 MB for 1.49 million blocks (docs/results/storm.md)."""
PAGE_LOCKED = 2.0
"""Times that what is moved to the host takes at most, since torch rounds page-locked memory up to a power of two."""


@dataclass(frozen=True, kw_only=True)
class NodeMemory:
    """Bytes of all ranks of a node in its main memory."""

    processes: float
    """Of ranks and workers."""
    stream: float
    """Decoded blocks and batches ahead; in `dies` where ranks compute on cores."""
    manifests: float
    """In every process."""
    offloaded: float
    """States of the optimizer that were moved here."""
    dies: float
    """All that a step takes, where ranks compute on cores."""

    @property
    def total(self) -> float:
        """All of it; copies of files that the kernel keeps (page cache) are not counted, since it lets them go."""
        return sum(asdict(self).values())


def node_memory(held: DieMemory, data: Sequence[TaskData], *, ranks: int, workers: int, gpu: bool) -> NodeMemory:
    """Return what `ranks` ranks of a node take of its main memory, each of which holds `held`."""
    processes = 1 + workers
    return NodeMemory(
        processes=ranks * (processes * PROCESS + (GPU_PROCESS if gpu else 0.0)),
        stream=ranks * held.stream if gpu else 0.0,
        manifests=ranks * processes * BYTES_OF_BLOCK * sum(task.blocks for task in data),
        offloaded=ranks * PAGE_LOCKED * (held.host - held.stream) if gpu else 0.0,
        dies=0.0 if gpu else ranks * held.total,
    )
