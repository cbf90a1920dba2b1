"""The collective operations of a training step, by ZeRO stage and precision.

They were recorded on real ranks by wrapping torch.distributed (`tests/ranks/collective_count.py`). ZeRO 1 and 2 sum
complete gradients with an all-reduce, not with a reduce-scatter: ZeRO 1 once per step, ZeRO 2 for every micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hydrazero.trainer.config.precision import Precision, precision_of
from hydrazero.trainer.cost.step_cost import ModelSize

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"
TABLE = 8
"""Bytes of a number in the tables that this package sums over ranks."""
DEFAULT_BUCKET = 500_000_000
"""Default number of gradient elements that DeepSpeed sends at once."""

PACKAGED_BUCKET = 50_000_000
"""Number of gradient elements that the packaged configurations of ZeRO 1 to 3 send at once."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """Collective operations of one kind and size in a step."""

    kind: str
    """'all_reduce', 'all_gather' or 'reduce_scatter'."""
    of: str
    """What is sent."""
    bytes: float
    """Bytes of one operation: those of the complete tensor, after a gather or before a scatter."""
    count: float
    """Number of operations in a step; below 1 if not every step has one."""
    ranks: int = 0
    """Number of ranks that take part; 0 for all ranks."""

    @property
    def total(self) -> float:
        """Bytes of all of these operations in a step."""
        return self.bytes * self.count


@dataclass(frozen=True, kw_only=True)
class Run:
    """The properties of a run on which its traffic and its memory depend."""

    size: ModelSize
    ds_config: dict[str, Any]
    """DeepSpeed JSON."""
    tasks: int
    quantities: int
    """Number of kinds of labels in the loss: energy, forces, stress, targets."""
    features: int
    balance_every: int
    """Number of steps between measurements of the tasks' gradients; 0 for never."""
    average: bool
    """Whether a moving average of the weights is kept."""

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return int(self.ds_config.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> Precision:
        """Precision of the run."""
        return precision_of(self.ds_config)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight with which the model computes."""
        return {"fp64": 8, "bf16": 2, "fp16": 2}.get(self.precision.key, 4)

    @property
    def master_bytes(self) -> int:
        """Bytes of a master weight, of an optimizer state, and of a sum of gradients."""
        return max(self.weight_bytes, 4)

    @property
    def micro_batches(self) -> int:
        """Number of batches of a rank in a step."""
        return int(self.ds_config.get("gradient_accumulation_steps", 1))

    @property
    def bucket(self) -> int:
        """Number of gradient elements that are sent at once."""
        return int(float(self.ds_config.get("zero_optimization", {}).get("reduce_bucket_size", DEFAULT_BUCKET)))

    def with_stage(self, stage: int) -> Run:
        """Return the same run with another ZeRO stage."""
        own = self.ds_config.get("zero_optimization", {})
        # A configuration whose stage has no bucket gets that of the packaged configurations.
        zero = {"reduce_bucket_size": PACKAGED_BUCKET, **own, "stage": stage} if stage != self.stage else own
        return replace(self, ds_config={**self.ds_config, "zero_optimization": zero})

    def with_micro_batches(self, count: int) -> Run:
        """Return the same run with another number of batches of a rank in a step."""
        return replace(self, ds_config={**self.ds_config, "gradient_accumulation_steps": count})


def step_messages(run: Run, ranks: int) -> list[Message]:
    """Return the collective operations of a step; there are none on one rank."""
    if ranks == 1:
        return []
    return [message for message in [*_parameters(run, ranks), *_own(run), *_checks(run)] if message.count]


def _parameters(run: Run, ranks: int) -> list[Message]:
    """Return the operations for gradients and weights."""
    count, stage, micro = run.size.parameters, run.stage, run.micro_batches
    buckets = -(-count // run.bucket)
    gradients = count * run.master_bytes / buckets
    if stage == 0:
        return [Message(kind=ALL_REDUCE, of="gradients", bytes=count * run.master_bytes, count=1)]
    if stage == 3:
        return [
            Message(kind=ALL_GATHER, of="weights", bytes=padded(count, ranks) * run.weight_bytes, count=micro),
            Message(kind=REDUCE_SCATTER, of="gradients", bytes=gradients, count=micro * buckets),
        ]
    times = micro if stage == 2 else 1
    return [
        Message(kind=ALL_REDUCE, of="gradients", bytes=gradients, count=times * buckets),
        *(
            Message(kind=ALL_GATHER, of="weights", bytes=padded(group, 2 * ranks) * run.weight_bytes, count=1)
            for group in run.size.groups
        ),
    ]


def padded(count: int, multiple: int) -> int:
    """Return a count rounded up to a multiple, so that each rank has equally many."""
    return -(-count // multiple) * multiple


def _own(run: Run) -> list[Message]:
    """Return the operations for counts of labels, sums of losses, and the tasks' gradients."""
    measured = run.tasks * run.features**2 * TABLE
    return [
        Message(kind=ALL_REDUCE, of="counts of labels", bytes=run.tasks * run.quantities * TABLE, count=1),
        Message(
            kind=ALL_REDUCE, of="sums of losses", bytes=(run.tasks * (3 * run.quantities + 1) + 3) * TABLE, count=1
        ),
        Message(
            kind=ALL_REDUCE,
            of="gradients of tasks",
            bytes=measured,
            count=1 / run.balance_every if run.balance_every else 0,
        ),
    ]


def _checks(run: Run) -> list[Message]:
    """Return the operations for the norm and the overflow of the gradients."""
    return [Message(kind=ALL_REDUCE, of="norm, overflow", bytes=4, count=1 if run.stage == 0 else 2)]
