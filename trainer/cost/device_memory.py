"""The memory of a device in a training step, part by part, for each ZeRO stage and precision.

The formulas follow DeepSpeed's buffers; a test compares them with the peak memory of real ranks
(`tests/ranks/test_plan_ranks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hydrazero.trainer.cost.traffic import Run

OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "lamb": 2, "lion": 1, "adagrad": 1, "sgd": 1}
"""Number of values that an optimizer keeps for each parameter."""
STREAM = 100e6
"""Bytes of a data-loading process: the decoded blocks that it keeps, and the batches that it has ready."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory of a device in bytes."""

    weights: float
    """Weights with which the model computes, and the master weights of the optimizer if there are any."""
    gradients: float
    """Gradients of the weights, and their sums."""
    optimizer: float
    """Optimizer states."""
    average: float
    """Moving average of the weights."""
    buffers: float
    """Buffers in which weights are gathered and gradients are collected for sending."""
    activations: float
    """Activations of a step with a full batch."""
    stream: float
    """Data-loading processes; they are in the host's memory if the device is a GPU."""
    host: float
    """Part of the above that is in the host's memory, because of offloading or in any case."""

    @property
    def states(self) -> float:
        """Memory that does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.average + self.buffers

    @property
    def total(self) -> float:
        """Memory on the device itself."""
        return self.states + self.activations + self.stream - self.host


def device_memory(run: Run, ranks: int, *, activations: float, gpu: bool, workers: int) -> DeviceMemory:
    """Return the memory of each of `ranks` ranks."""
    count, stage, share = run.size.parameters, run.stage, 1 / ranks
    low, high = run.weight_bytes, run.master_bytes
    whole = count * low * (1 if stage < 3 else share)
    masters = count * high * (share if stage else 0)
    kind = str(run.ds_config.get("optimizer", {}).get("type", "")).lower()
    states = OPTIMIZER_STATES.get(kind, 2) * count * high * (share if stage else 1)
    average = count * high * (share if stage else 1) if run.average else 0.0
    offloaded = "offload_optimizer" in run.ds_config.get("zero_optimization", {})
    stream = STREAM * max(workers, 1)
    return DeviceMemory(
        weights=whole + masters,
        gradients=count * low + count * high * (share if stage else 0),
        optimizer=states,
        average=average,
        buffers=_buffers(run, gpu),
        activations=activations,
        stream=stream,
        host=(stream if gpu else 0.0) + (masters + states + average if gpu and offloaded else 0.0),
    )


def _buffers(run: Run, gpu: bool) -> float:
    """Return the memory of the buckets of gradients and of gathered weights, in bytes.

    With ZeRO, gradients are copied into the bucket one by one and then freed: on a CPU, only the used part of the
    bucket takes memory beyond that of the gradients. On a GPU, the complete bucket takes memory.
    """
    count = run.size.parameters
    if run.stage == 0:
        return count * run.master_bytes  # all gradients in one flat tensor
    bucket = run.bucket * run.master_bytes if gpu else 0.0
    if run.stage < 3:
        return bucket
    return count * run.weight_bytes + (bucket if gpu else min(run.bucket, count) * run.master_bytes)
