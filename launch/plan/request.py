"""What a plan is asked for, and whether that divides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydrazero.launch.job.site_file import Site
from hydrazero.launch.plan.compute import Bench
from hydrazero.launch.plan.data import TaskData
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.config.run_file import RunConfig

FILLED = 0.96
"""Share of a batch's atoms that is used (make bench: packing_fill)."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is asked for."""

    config: RunConfig
    site: Site
    nodes: int
    ranks_per_node: int
    global_batch: int
    """Structures in a step; 0: what the run file's accumulation gives."""
    hours: float
    """Of a job; 0: the site's most for so many nodes."""
    bench: Bench

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self.nodes * self.ranks_per_node


def check_asked(asked: Asked) -> None:
    """Raise ConfigError for hours that are no number and for more ranks on a node than it has dies."""
    if math.isnan(asked.hours):
        raise ConfigError("--hours is nan; it must be a number of hours.")
    dies = asked.site.nodes.dies
    if asked.ranks_per_node > dies:
        raise ConfigError(
            f"--ranks-per-node is {asked.ranks_per_node}, but a node of site {asked.site.name} has {dies} dies, one "
            "for each rank; ask for no more, and for more --nodes."
        )


def check_deepspeed(ds_config: dict[str, Any]) -> None:
    """Raise ConfigError for what DeepSpeed would refuse, and a plan counts with."""
    zero = ds_config.get("zero_optimization", {})
    for name, value, right, wanted in (
        ("zero_optimization.stage", zero.get("stage", 0), lambda n: n in (0, 1, 2, 3), "0, 1, 2 or 3"),
        ("zero_optimization.reduce_bucket_size", zero.get("reduce_bucket_size", 1), _at_least_one, "at least 1"),
        (
            "gradient_accumulation_steps",
            ds_config.get("gradient_accumulation_steps", 1),
            lambda n: _at_least_one(n) and n == int(n),
            "a whole number of at least 1",
        ),
    ):
        if not right(value):
            raise ConfigError(f"deepspeed.{name} is {value}; it must be {wanted}.")


def _at_least_one(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < math.inf


def check_batch(shape: BatchShape, data: Sequence[TaskData]) -> None:
    """Raise ConfigError if a batch does not even hold a task's mean structure."""
    largest = max(data, key=lambda task: task.atoms)
    if largest.atoms > shape.atoms:
        raise ConfigError(
            f"batch.atoms is {shape.atoms}, but structures of task '{largest.name}' have {largest.atoms:.0f} atoms in "
            "the mean; give it more."
        )


def structures_of(shape: BatchShape, atoms: float) -> int:
    """Structures in a batch, by whichever budget is used up first, whole."""
    return max(min(shape.structures, int(FILLED * shape.atoms / atoms)), 1)


def accumulation(asked: Asked, per_batch: int, own: int) -> int:
    """Return the batches of a rank in a step; raises ConfigError, with what divides, if the global batch does not."""
    wanted, at_once = asked.global_batch, asked.ranks * per_batch
    if not wanted:
        return own
    if wanted % at_once:
        near = sorted({max(wanted // at_once, 1), wanted // at_once + 1})
        ways = " or ".join(
            f"{count * at_once:,} ({count} {'batch' if count == 1 else 'batches'} of each rank)" for count in near
        )
        raise ConfigError(
            f"--global-batch {wanted:,} is no multiple of {asked.ranks:,} ranks times {per_batch} structures; nearest "
            f"{'is' if len(near) == 1 else 'are'} {ways}."
        )
    return wanted // at_once
