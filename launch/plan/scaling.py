"""The duration of a step on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydrazero.launch.job.site_file import Site
from hydrazero.launch.plan.collectives import CollectiveCost, cost, links_of
from hydrazero.launch.plan.compute import Pace
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.cost.step_cost import StepCost
from hydrazero.trainer.cost.traffic import Message, Run, step_messages

RANKS = tuple(4**power for power in range(8))
"""Numbers of ranks for which scaling is shown, up to the size of the site: 1 to 16,384."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The parts of a step in seconds."""

    compute: float
    """Forward and backward passes of all micro-batches."""
    optimizer: float
    """The optimizer's update, limited by the device's memory bandwidth."""
    communication: float
    """All collective operations, one after the other."""
    data: float
    """Time in which the workers of a rank make its batches, concurrently; 0 if their speed is not known."""

    @property
    def seconds(self) -> float:
        """Duration of the step; a compiled step yields all gradients at its end, so nothing is sent meanwhile."""
        return max(self.compute + self.optimizer + self.communication, self.data)

    @property
    def overlapped(self) -> float:
        """Duration if everything were sent during the computation: the longest of the three."""
        return max(self.compute + self.optimizer, self.communication, self.data)


OPTIMIZER_PASSES = 7
"""Values per parameter that AdamW reads and writes: gradient, weight and two moments, the last three twice."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """The time per step of a run on a site."""

    run: Run
    site: Site
    pace: Pace
    cost: StepCost
    shape: BatchShape
    workers: int
    """Number of data-loading processes of a rank."""

    def collectives(self, ranks: int, micro_batches: int) -> list[tuple[Message, CollectiveCost]]:
        """Return the collective operations of a step, each with the cost of one of them."""
        links = links_of(self.site, ranks)
        run = self.run.with_micro_batches(micro_batches)
        return [(message, cost(message, links)) for message in step_messages(run, ranks)]

    def time(self, ranks: int, micro_batches: int) -> StepTime:
        """Return the duration of a step."""
        by_workers = None if self.pace.atoms_of_worker is None else self.pace.atoms_of_worker * max(self.workers, 1)
        stepped = self.run.size.parameters / (ranks if self.run.stage else 1)
        return StepTime(
            compute=micro_batches * self.pace.seconds(self.cost, self.shape),
            optimizer=OPTIMIZER_PASSES * stepped * self.run.master_bytes / self.pace.bandwidth,
            communication=sum(message.count * one.seconds for message, one in self.collectives(ranks, micro_batches)),
            data=0.0 if by_workers is None else micro_batches * self.shape.atoms / by_workers,
        )

    def scaling(self, largest: int, own: int, micro_batches: int) -> dict[str, Any]:
        """Return weak and strong scaling up to the largest job of the site, and at the plan's own number of ranks."""
        ranks = sorted({own, *(count for count in RANKS if count <= largest)})
        return {
            "batches": ranks[-1],
            "weak": self.weak(ranks, micro_batches),
            "strong": self.strong(ranks, ranks[-1]),
        }

    def weak(self, ranks: Sequence[int], micro_batches: int) -> list[dict[str, float]]:
        """Return seconds and efficiency of a step in which every rank has the same number of batches."""
        times = [self.time(count, micro_batches) for count in ranks]
        return [
            {"ranks": count, "seconds": time.seconds, "efficiency": times[0].seconds / time.seconds}
            for count, time in zip(ranks, times, strict=True)
        ]

    def strong(self, ranks: Sequence[int], batches: int) -> list[dict[str, float]]:
        """Return seconds and efficiency of a step whose `batches` are divided among ranks, at least one for each."""
        rows = [{"ranks": count, "seconds": self.time(count, -(-batches // count)).seconds} for count in ranks]
        return [
            {**row, "efficiency": rows[0]["seconds"] * rows[0]["ranks"] / (row["seconds"] * row["ranks"])}
            for row in rows
        ]
