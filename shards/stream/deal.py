"""Deterministic distribution of the blocks of all tasks to the workers of all ranks, from the manifests alone.

A lane is one worker of one rank. A piece is a complete block of a task with many blocks, or a part of a block of a task
with few, so that small tasks are distributed evenly too. In each pass over a task, its pieces are permuted and dealt to
the lanes in turn like cards: every structure is delivered exactly once per pass, for any number of lanes. If the number
of lanes changes, the rest of the epoch is dealt again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError

PIECES_PER_LANE = 8
"""Number of pieces that each lane gets at least, if the task has enough structures."""

Pieces = NDArray[np.int64]
"""Array [pieces, 4]: number of the pass, block, and start and stride in the order of the block in that pass."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """Facts on one task for the deal."""

    name: str
    block_sizes: NDArray[np.int64]
    """Number of structures in each block of the split, [blocks]."""
    repeats: float = 1.0
    """Number of passes over the task in one epoch; it differs from 1 if a temperature or shares are set."""

    @property
    def structures(self) -> int:
        """Number of structures in one pass."""
        return int(self.block_sizes.sum())


@dataclass(kw_only=True)
class LanePlace:
    """Position of a lane: the epoch, and the number of structures of each task that it has drawn in it."""

    epoch: int = 0
    delivered: list[int] = field(default_factory=list)
    """Empty at the start of an epoch."""


@dataclass(frozen=True, kw_only=True)
class Rest:
    """Rest of an epoch at the time when the number of lanes changed."""

    epoch: int
    pieces: tuple[Pieces, ...]
    """Remaining pieces of each task."""


EPOCH_STRUCTURES = 65_536
"""Number of structures beyond which an epoch with fixed shares is not extended, since all its passes are planned at its
start."""


def mixture_repeats(structures: Sequence[int], temperature: float, shares: Sequence[float | None] = ()) -> list[float]:
    """Return the number of passes per epoch for each task, sampled in proportion to structures ** (1 / temperature).

    Temperature 1 is one pass over each task. A higher temperature repeats small tasks and skips a part of large ones,
    while the number of structures per epoch stays the same (temperature sampling as in multilingual models,
    Arivazhagan et al. 2019).

    `shares` are fixed shares of all structures for some tasks, and None for the others, which divide the rest. An epoch
    is then at least one pass over the others, and longer if each task with a share is thereby passed once. Raises
    ConfigError for a temperature below 1.
    """
    if not temperature >= 1.0:
        raise ConfigError(f"mixture.temperature is {temperature}; it must be at least 1.")
    counts = np.asarray(structures, dtype=np.float64)
    share = counts ** (1.0 / temperature)
    fixed = np.array([np.nan if value is None else value for value in shares] or [np.nan] * len(counts))
    free = np.isnan(fixed)
    if free.all():
        share *= counts.sum() / share.sum()
        return [float(value) for value in share / counts]
    share = np.where(free, share / max(share[free].sum(), 1e-300) * (1.0 - fixed[~free].sum()), fixed)
    one_pass = counts[free].sum() / share[free].sum() if free.any() else counts.max()
    epoch = max(one_pass, min(float((counts / share)[~free].max()), EPOCH_STRUCTURES))
    return [float(value) for value in share * epoch / counts]


def lane_number(rank: int, worker: int, ranks: int) -> int:
    """Return the lane of a worker; neighbouring lanes are of different ranks, so that remainders are shared evenly."""
    return worker * ranks + rank


class Deal:
    """Distribution of pieces to lanes: the pieces that each lane delivers in each epoch, in order."""

    def __init__(self, tasks: Sequence[TaskPlan], *, lanes: int, seed: int, rest: Rest | None = None) -> None:
        self.tasks, self.lanes, self.seed = list(tasks), lanes, seed
        self.parts = [self._cuts(len(task.block_sizes), int(task.block_sizes.max())) for task in self.tasks]
        """Number of parts into which the blocks of each task are cut."""
        counts = [
            max(1, round(task.repeats * len(task.block_sizes) * parts))
            for task, parts in zip(self.tasks, self.parts, strict=True)
        ]
        self._per_epoch = counts
        self._rest_epoch = None if rest is None else rest.epoch
        self._rest = () if rest is None else tuple(self._shuffled_rest(i, rest) for i in range(len(self.tasks)))

    def _cuts(self, pieces: int, largest: int) -> int:
        """Return into how many parts pieces are cut, so that every lane gets enough; about `largest` at most."""
        parts = 1
        while pieces * parts < PIECES_PER_LANE * self.lanes and parts < largest:
            parts *= 2
        return parts

    def _generator(self, *key: int) -> np.random.RandomState:
        # NumPy guarantees that this generator's numbers never change: a run can be resumed with a newer NumPy.
        return np.random.RandomState([self.seed & 0xFFFFFFFF, *(k & 0xFFFFFFFF for k in key)])

    def _shuffled_rest(self, index: int, rest: Rest) -> Pieces:
        pieces = rest.pieces[index]
        if len(pieces):
            cuts = self._cuts(len(pieces), int(self.piece_sizes(index, pieces).max()))
            number, block, start, stride = (np.repeat(column, cuts) for column in pieces.T)
            part = np.tile(np.arange(cuts), len(pieces))
            pieces = np.stack([number, block, start + part * stride, stride * cuts], axis=1)
            pieces = pieces[self.piece_sizes(index, pieces) > 0]
        return pieces[self._generator(3, index, rest.epoch, self.lanes).permutation(len(pieces))]

    def _count(self, index: int, epoch: int) -> int:
        """Return the number of pieces of a task in an epoch."""
        return len(self._rest[index]) if epoch == self._rest_epoch else self._per_epoch[index]

    def _first_lane(self, index: int, epoch: int) -> int:
        """Return the lane that gets the first piece; each task and epoch continues after the lane of the last piece."""
        before = sum(self._count(i, epoch) for i in range(index))
        return (epoch * sum(self._per_epoch) + before) % self.lanes

    def _pieces_at(self, index: int, epoch: int, turns: NDArray[np.int64]) -> Pieces:
        """Return the pieces that are dealt at the given turns of an epoch."""
        if epoch == self._rest_epoch:
            return self._rest[index][turns]
        parts = self.parts[index]
        per_pass = len(self.tasks[index].block_sizes) * parts
        # Epochs follow each other in an endless series of passes: a task with less than one pass per epoch is covered
        # by several epochs.
        places = turns + epoch * self._per_epoch[index]
        pieces = np.empty((len(turns), 4), dtype=np.int64)
        for number in np.unique(places // per_pass):
            in_pass = places // per_pass == number
            order = self._generator(1, index, int(number)).permutation(per_pass)
            piece = order[places[in_pass] % per_pass]
            columns = [np.full(len(piece), number), piece // parts, piece % parts, np.full(len(piece), parts)]
            pieces[in_pass] = np.stack(columns, axis=1)
        return pieces

    def lane_pieces(self, index: int, epoch: int, lane: int) -> Pieces:
        """Return the pieces of a task that a lane delivers in an epoch, in order."""
        first = (lane - self._first_lane(index, epoch)) % self.lanes
        return self._pieces_at(index, epoch, np.arange(first, self._count(index, epoch), self.lanes))

    def piece_sizes(self, index: int, pieces: Pieces) -> NDArray[np.int64]:
        """Return the number of structures in each piece, [pieces]."""
        left = self.tasks[index].block_sizes[pieces[:, 1]] - pieces[:, 2]
        return np.maximum(-(-left // pieces[:, 3]), 0)

    def piece_rows(self, index: int, piece: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the block that belong to a piece, in the order of delivery."""
        number, block, start, stride = (int(value) for value in piece)
        order = self._generator(2, index, number, block).permutation(int(self.tasks[index].block_sizes[block]))
        return order[start::stride]

    def _deliveries(self, index: int, pieces: Pieces, skip: int) -> Iterator[tuple[int, int]]:
        """Yield the blocks and rows of pieces; the first `skip` rows are skipped without a walk through them."""
        ends = np.cumsum(self.piece_sizes(index, pieces))
        first = int(np.searchsorted(ends, skip, side="right"))
        skip -= int(ends[first - 1]) if first else 0
        for piece in pieces[first:]:
            for row in self.piece_rows(index, piece)[skip:]:
                yield int(piece[1]), int(row)
            skip = 0

    def walk(self, lane: int, place: LanePlace, *, epochs: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield (task, block, row) for a lane from `place` on, which is updated; without end unless `epochs` is set.

        Tasks are interleaved so that at any time each has delivered the same fraction of its epoch.
        """
        last = None if epochs is None else place.epoch + epochs
        everyone = range(len(self.tasks))
        while last is None or place.epoch < last:
            pieces = [self.lane_pieces(i, place.epoch, lane) for i in everyone]
            totals = [int(self.piece_sizes(i, pieces[i]).sum()) for i in everyone]
            if not place.delivered:
                place.delivered = [0] * len(self.tasks)
            sources = [self._deliveries(i, pieces[i], place.delivered[i]) for i in everyone]
            for _ in range(sum(totals) - sum(place.delivered)):
                task = min(
                    (i for i in everyone if place.delivered[i] < totals[i]),
                    key=lambda i: (place.delivered[i] + 0.5) / totals[i],
                )
                block, row = next(sources[task])
                place.delivered[task] += 1
                yield task, block, row
            place.epoch += 1
            place.delivered = []

    def rest(self, places: Sequence[LanePlace]) -> Rest:
        """Return what lanes at the given places have not drawn up to the end of the latest epoch among them."""
        last = max(place.epoch for place in places)
        at = np.array([place.epoch for place in places])
        pieces = []
        for index in range(len(self.tasks)):
            drawn = np.array([place.delivered[index] if place.delivered else 0 for place in places])
            left = [self._left(index, epoch, at, drawn) for epoch in range(int(at.min()), last + 1)]
            pieces.append(np.concatenate(left))
        return Rest(epoch=last, pieces=tuple(pieces))

    def _left(self, index: int, epoch: int, at: NDArray[np.int64], drawn: NDArray[np.int64]) -> Pieces:
        """Return the rest of the pieces of an epoch that lanes in epochs `at` have not drawn."""
        turns = np.arange(self._count(index, epoch))
        lanes = (turns + self._first_lane(index, epoch)) % self.lanes
        order = np.argsort(lanes, kind="stable")
        pieces, lanes = self._pieces_at(index, epoch, turns)[order], lanes[order]
        sizes = self.piece_sizes(index, pieces)
        ends = np.cumsum(sizes)
        totals = np.bincount(lanes, weights=sizes, minlength=self.lanes).astype(np.int64)
        ends -= (np.cumsum(totals) - totals)[lanes]  # counted from the first piece of each lane
        done = np.where(at > epoch, totals, np.where(at == epoch, drawn, 0))[lanes]
        left = np.clip(ends - done, 0, sizes)
        pieces[:, 2] += pieces[:, 3] * (sizes - left)
        return pieces[left > 0]
