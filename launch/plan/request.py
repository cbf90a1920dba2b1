"""The input of a plan, and checks of its numbers."""

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
from hydrazero.trainer.config.sections import ModelSection, PlanSection, TaskSection

FILLED = 0.96
"""Fraction of a batch's atoms that is used (make bench: packing_fill)."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The settings of a run file on which a plan depends."""

    out: str
    """Run folder."""
    tasks: tuple[TaskSection, ...]
    shares: tuple[float | None, ...]
    """Fixed fractions of the tasks in batches; empty if no task has one."""
    temperature: float
    """Temperature of the mixture of tasks."""
    workers: int
    """Number of data-loading processes of a rank."""
    model: ModelSection
    batch: BatchShape
    balance_every: int
    """Number of steps between measurements of the tasks' gradients; 0 for never."""
    steps: int
    """Number of training steps."""
    compiled: bool
    """Whether steps are compiled."""
    average: bool
    """Whether a moving average of the weights is kept."""
    ds_config: dict[str, Any]
    """Complete DeepSpeed configuration."""
    assumed: PlanSection
    """What is assumed about shards that do not exist yet."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The input of a plan: a run, a site and the size of a job."""

    settings: PlanSettings
    site: Site
    nodes: int
    ranks_per_node: int
    global_batch: int
    """Number of structures in a step of all ranks; 0 for the gradient accumulation of the run file."""
    hours: float
    """Time limit of a job; 0 for the longest that the site gives to this number of nodes."""
    bench: Bench

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * self.ranks_per_node


def check_request(request: PlanRequest) -> None:
    """Raise ConfigError if the hours are not a number or if a node has fewer devices than ranks."""
    if math.isnan(request.hours):
        raise ConfigError("--hours is nan; it must be a number of hours.")
    devices = request.site.nodes.dies
    if request.ranks_per_node > devices:
        raise ConfigError(
            f"--ranks-per-node is {request.ranks_per_node}, but a node of site {request.site.name} has {devices} "
            f"devices, one for each rank; use at most {devices} ranks per node, and more --nodes."
        )


def check_deepspeed(ds_config: dict[str, Any]) -> None:
    """Raise ConfigError for values with which a plan calculates and which DeepSpeed would reject."""
    zero = ds_config.get("zero_optimization", {})
    for name, value, right, allowed in (
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
            raise ConfigError(f"deepspeed.{name} is {value}; it must be {allowed}.")


def _at_least_one(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < math.inf


def check_batch(shape: BatchShape, data: Sequence[TaskData]) -> None:
    """Raise ConfigError if a batch does not even hold a structure of mean size of some task."""
    largest = max(data, key=lambda task: task.atoms)
    if largest.atoms > shape.atoms:
        raise ConfigError(
            f"batch.atoms is {shape.atoms}, but structures of task '{largest.name}' have {largest.atoms:.0f} atoms on "
            "average; increase it."
        )


def structures_per_batch(shape: BatchShape, atoms: float) -> int:
    """Return the number of structures in a batch, given the mean number of atoms of a structure.

    It is limited by batch.structures or batch.atoms, whichever is reached first.
    """
    return max(min(shape.structures, int(FILLED * shape.atoms / atoms)), 1)


def accumulation(request: PlanRequest, per_batch: int, own: int) -> int:
    """Return the number of batches of a rank in a step.

    `own` is the number in the run file, which applies without --global-batch. Raise ConfigError, with the nearest
    numbers that are possible, if --global-batch is not a multiple of the structures of all ranks.
    """
    requested, at_once = request.global_batch, request.ranks * per_batch
    if not requested:
        return own
    if requested % at_once:
        near = sorted({max(requested // at_once, 1), requested // at_once + 1})
        choices = " or ".join(
            f"{count * at_once:,} ({count} {'batch' if count == 1 else 'batches'} per rank)" for count in near
        )
        raise ConfigError(
            f"--global-batch {requested:,} is not a multiple of {request.ranks:,} ranks times {per_batch} structures; "
            f"the nearest {'is' if len(near) == 1 else 'are'} {choices}."
        )
    return requested // at_once
