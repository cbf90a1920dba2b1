"""How long a step takes on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydrazero.launch.job.site_file import Site
from hydrazero.launch.plan.collectives import Sent, cost, links_of
from hydrazero.launch.plan.compute import Pace
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.trainer.cost.step_cost import StepCost
from hydrazero.trainer.cost.traffic import Message, Run, step_messages

RANKS = tuple(4**power for power in range(8))
"""1 to 16,384, as scaling is shown where a site has so many."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    """Of all micro-batches."""
    optimizer: float
    """Weights, gradients and states through the die's memory."""
    communication: float
    """Of all collectives, one after the other."""
    data: float
    """In which the rank's workers make its batches, beside all that; 0 where their pace is not known."""

    @property
    def seconds(self) -> float:
        """As it is: a compiled step hands over all gradients at its end, so nothing is sent while it computes."""
        return max(self.compute + self.optimizer + self.communication, self.data)

    @property
    def overlapped(self) -> float:
        """What it would be if everything were sent while it computes: the longest of the three."""
        return max(self.compute + self.optimizer, self.communication, self.data)


OPTIMIZER_PASSES = 7
"""Numbers of a parameter that AdamW reads and writes: gradient, weight and two moments, the last three twice."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """Step times of a run on a site."""

    run: Run
    site: Site
    pace: Pace
    cost: StepCost
    shape: BatchShape
    workers: int
    """Processes of a rank that make batches."""

    def sent(self, ranks: int, micro_batches: int) -> list[tuple[Message, Sent]]:
        """Return what a step sends, each with what one of it costs."""
        links = links_of(self.site, ranks)
        run = self.run.with_micro_batches(micro_batches)
        return [(message, cost(message, links)) for message in step_messages(run, ranks)]

    def time(self, ranks: int, micro_batches: int) -> StepTime:
        """Return the time of a step."""
        by_workers = None if self.pace.atoms_of_worker is None else self.pace.atoms_of_worker * max(self.workers, 1)
        stepped = self.run.size.parameters / (ranks if self.run.stage else 1)
        return StepTime(
            compute=micro_batches * self.pace.seconds(self.cost, self.shape),
            optimizer=OPTIMIZER_PASSES * stepped * self.run.master_bytes / self.pace.bandwidth,
            communication=sum(message.count * one.seconds for message, one in self.sent(ranks, micro_batches)),
            data=0.0 if by_workers is None else micro_batches * self.shape.atoms / by_workers,
        )

    def scaling(self, most: int, own: int, micro_batches: int) -> dict[str, Any]:
        """Return steps on more and more ranks, up to the `most` that the site gives to a job, with the plan's `own`."""
        ranks = sorted({own, *(count for count in RANKS if count <= most)})
        return {
            "batches": ranks[-1],
            "weak": self.weak(ranks, micro_batches),
            "strong": self.strong(ranks, ranks[-1]),
        }

    def weak(self, ranks: Sequence[int], micro_batches: int) -> list[dict[str, float]]:
        """Each rank keeps its batches: seconds of a step, and efficiency over the first."""
        times = [self.time(count, micro_batches) for count in ranks]
        return [
            {"ranks": count, "seconds": time.seconds, "efficiency": times[0].seconds / time.seconds}
            for count, time in zip(ranks, times, strict=True)
        ]

    def strong(self, ranks: Sequence[int], batches: int) -> list[dict[str, float]]:
        """The step keeps its `batches`, shared by fewer or more ranks, each of which has one at least."""
        rows = [{"ranks": count, "seconds": self.time(count, -(-batches // count)).seconds} for count in ranks]
        return [
            {**row, "efficiency": rows[0]["seconds"] * rows[0]["ranks"] / (row["seconds"] * row["ranks"])}
            for row in rows
        ]
