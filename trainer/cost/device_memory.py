"""What a die holds in a training step, part by part, under each ZeRO stage and precision.

What DeepSpeed keeps was read off its buffers, and is held to the peak of real ranks (`tests/ranks/test_plan_ranks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hydrazero.trainer.cost.traffic import Run

OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "lamb": 2, "lion": 1, "adagrad": 1, "sgd": 1}
"""Numbers that an optimizer keeps of each parameter."""
STREAM = 100e6
"""Bytes of a worker of the stream: decoded blocks that it keeps (shards/stream/block_reader.py) and batches ahead."""


@dataclass(frozen=True, kw_only=True)
class DieMemory:
    """Bytes on a die."""

    weights: float
    """That the model computes with, and the optimizer's own where it has them."""
    gradients: float
    optimizer: float
    """States of the optimizer."""
    average: float
    """Moving average of the weights."""
    buffers: float
    """In which weights are gathered and gradients are put together to be sent."""
    activations: float
    """Of a step with a full batch."""
    stream: float
    """Of the workers that read; in the host's memory where the die is a GPU."""
    host: float
    """Of the above, what is moved to the host by offloading or lies there anyway."""

    @property
    def states(self) -> float:
        """Of it, what the model takes whatever the batch."""
        return self.weights + self.gradients + self.optimizer + self.average + self.buffers

    @property
    def total(self) -> float:
        """On the die itself."""
        return self.states + self.activations + self.stream - self.host


def die_memory(run: Run, ranks: int, *, activations: float, gpu: bool, workers: int) -> DieMemory:
    """Return what each of `ranks` ranks holds."""
    count, stage, share = run.size.parameters, run.stage, 1 / ranks
    low, high = run.weight_bytes, run.master_bytes
    whole = count * low * (1 if stage < 3 else share)
    masters = count * high * (share if stage else 0)
    kind = str(run.ds_config.get("optimizer", {}).get("type", "")).lower()
    states = OPTIMIZER_STATES.get(kind, 2) * count * high * (share if stage else 1)
    average = count * high * (share if stage else 1) if run.average else 0.0
    offloaded = "offload_optimizer" in run.ds_config.get("zero_optimization", {})
    stream = STREAM * max(workers, 1)
    return DieMemory(
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
    """Buckets of gradients and gathered weights.

    Under ZeRO gradients go into the bucket one by one, and each is let go of: on a CPU what is touched of the bucket is
    no more than they have taken. On a GPU the whole bucket takes memory.
    """
    count = run.size.parameters
    if run.stage == 0:
        return count * run.master_bytes  # all gradients in one flat tensor
    bucket = run.bucket * run.master_bytes if gpu else 0.0
    if run.stage < 3:
        return bucket
    return count * run.weight_bytes + (bucket if gpu else min(run.bucket, count) * run.master_bytes)
