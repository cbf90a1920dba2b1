"""Who reads what, when: a deterministic deal of every task's blocks to lanes, from the manifests alone.

A lane is one worker of one rank. A piece is a part of a block: the whole block where a task has many, a fraction of it
where it has few, so that small tasks are dealt fairly too. In each pass over a task its pieces are permuted anew and
dealt to the lanes in turn: each structure is delivered exactly once a pass, whatever the number of lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError

PIECES_PER_LANE = 8
"""A task is cut until each lane has at least this many pieces, if it has the structures for it."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What the deal needs to know of one task."""

    name: str
    block_sizes: NDArray[np.int64]
    """Structures in each block of the split."""
    repeats: float = 1.0
    """Passes over the task in one epoch; other than 1 where a mixture temperature is set."""

    @property
    def structures(self) -> int:
        """Structures in one pass."""
        return int(self.block_sizes.sum())


@dataclass(kw_only=True)
class LanePlace:
    """Where a lane is: the epoch, and how many structures of each task it has handed out in it."""

    epoch: int = 0
    delivered: list[int] = field(default_factory=list)


def mixture_repeats(structures: Sequence[int], temperature: float) -> list[float]:
    """Return passes per epoch for each task when tasks are sampled in proportion to structures ** (1 / temperature).

    Temperature 1 is one pass over each; a higher one repeats small tasks and thins large ones, while the number of
    structures in an epoch stays the same (temperature sampling as in multilingual models, Arivazhagan et al. 2019).
    """
    if temperature < 1.0:
        raise ConfigError(f"mixture.temperature is {temperature}; it must be at least 1.")
    counts = np.asarray(structures, dtype=np.float64)
    share = counts ** (1.0 / temperature)
    share *= counts.sum() / share.sum()
    return [float(value) for value in share / counts]


class LanePlan:
    """The order in which one lane delivers structures: pairs (task, block, row) without end."""

    def __init__(self, tasks: Sequence[TaskPlan], *, lane: int, lanes: int, seed: int) -> None:
        self.tasks = list(tasks)
        self.lane, self.lanes, self.seed = lane, lanes, seed
        self._parts = [self._parts_per_block(task) for task in self.tasks]

    def _parts_per_block(self, task: TaskPlan) -> int:
        wanted = PIECES_PER_LANE * self.lanes
        parts = 1
        while len(task.block_sizes) * parts < wanted and parts < int(task.block_sizes.max()):
            parts *= 2
        return parts

    def _pieces_per_epoch(self, index: int) -> int:
        task = self.tasks[index]
        return max(1, round(task.repeats * len(task.block_sizes) * self._parts[index]))

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, *key))))

    def lane_pieces(self, index: int, epoch: int) -> NDArray[np.int64]:
        """Pieces of a task that this lane delivers in an epoch: rows (pass, block, part)."""
        task, parts = self.tasks[index], self._parts[index]
        per_pass, per_epoch = len(task.block_sizes) * parts, self._pieces_per_epoch(index)
        # Epochs follow each other in the endless series of passes, so a thinned task is covered over several epochs.
        places = np.arange(epoch * per_epoch, (epoch + 1) * per_epoch, dtype=np.int64)
        # Tasks start at different lanes, or lane 0 would get the odd piece of every task.
        mine = places[(places + 7 * index + epoch) % self.lanes == self.lane]
        rows = np.empty((len(mine), 3), dtype=np.int64)
        for number in np.unique(mine // per_pass):
            in_pass = mine // per_pass == number
            order = self._generator(1, index, int(number)).permutation(per_pass)
            piece = order[mine[in_pass] % per_pass]
            rows[in_pass] = np.stack([np.full(len(piece), number), piece // parts, piece % parts], axis=1)
        return rows

    def piece_sizes(self, index: int, pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        """Structures in each of the pieces (rows of `lane_pieces`)."""
        sizes, parts = self.tasks[index].block_sizes[pieces[:, 1]], self._parts[index]
        return (sizes - pieces[:, 2] + parts - 1) // parts

    def piece_rows(self, index: int, piece: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the block that belong to a piece, in the order of their delivery."""
        number, block, part = (int(value) for value in piece)
        order = self._generator(2, index, number, block).permutation(int(self.tasks[index].block_sizes[block]))
        return order[part :: self._parts[index]]

    def epoch_sizes(self, epoch: int) -> list[int]:
        """Structures of each task that this lane delivers in an epoch."""
        return [int(self.piece_sizes(i, self.lane_pieces(i, epoch)).sum()) for i in range(len(self.tasks))]

    def _deliveries(self, index: int, epoch: int, skip: int) -> Iterator[tuple[int, int]]:
        """Blocks and rows of a task in an epoch, the first `skip` left out without walking through them."""
        pieces = self.lane_pieces(index, epoch)
        ends = np.cumsum(self.piece_sizes(index, pieces))
        first = int(np.searchsorted(ends, skip, side="right"))
        before = int(ends[first - 1]) if first else 0
        for piece in pieces[first:]:
            for row in self.piece_rows(index, piece)[skip - before :]:
                yield int(piece[1]), int(row)
            before = skip = 0

    def walk(self, place: LanePlace, *, epochs: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield (task, block, row) from `place` on, which is moved along; without end unless `epochs` are given.

        Tasks are interleaved so that each has delivered the same fraction of its epoch at any time.
        """
        last = None if epochs is None else place.epoch + epochs
        while last is None or place.epoch < last:
            totals = self.epoch_sizes(place.epoch)
            if not place.delivered:
                place.delivered = [0] * len(self.tasks)
            sources = [self._deliveries(i, place.epoch, place.delivered[i]) for i in range(len(self.tasks))]
            for _ in range(sum(totals) - sum(place.delivered)):
                task = min(
                    (i for i, total in enumerate(totals) if place.delivered[i] < total),
                    key=lambda i: (place.delivered[i] + 0.5) / totals[i],
                )
                block, row = next(sources[task])
                place.delivered[task] += 1
                yield task, block, row
            place.epoch += 1
            place.delivered = []
