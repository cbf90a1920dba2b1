"""Packing of structures into batches of a fixed size, with look-ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from hydrazero.shards.errors import StructureError
from hydrazero.shards.graphs.graph import BatchShape, GraphSample
from hydrazero.shards.graphs.neighbours import ROW_SLOTS

LOOK_AHEAD = 5
"""Batches' worth of structures that wait, so that one can be found for every gap."""

IN_TURN = 0.5
"""Share of a batch that is filled with whatever waits longest; the rest goes to what fits best."""


def fits(sample: GraphSample, shape: BatchShape) -> bool:
    """Whether a batch can hold the sample."""
    return len(sample.structure) <= shape.atoms and sample.rows <= shape.rows and sample.edges <= shape.most_edges


def check_fits(sample: GraphSample, shape: BatchShape) -> None:
    """Raise StructureError, with the budget that it would need, if no batch holds the sample."""
    if fits(sample, shape):
        return
    n, slots = len(sample.structure), sample.rows * ROW_SLOTS
    needs = {
        "atoms": (n, shape.atoms),
        "slots": (slots, shape.rows * ROW_SLOTS),
        "edges": (sample.edges, shape.most_edges),
    }
    wanted = " and ".join(f"batch.{name} to at least {need}" for name, (need, held) in needs.items() if need > held)
    raise StructureError(
        "too_large",
        f"{sample.structure.source_id} has {n} atoms, {sample.edges} edges and takes {slots} neighbour slots, more "
        f"than a batch holds; set {wanted}.",
    )


class Packer:
    """Collects samples and gives out lists of them that fill a batch.

    A pure function of the order in which samples come, so the same stream gives the same batches; `pending` is what a
    checkpoint must hold besides the place in the stream.
    """

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        self._budget = np.array([shape.structures, shape.atoms, shape.rows, shape.most_edges], dtype=np.float64)
        self.pending: list[GraphSample] = []
        """Samples that wait, in the order in which they came."""
        self._used: list[np.ndarray] = []
        """What each takes of the budget, as shares of it."""
        self._waiting = np.zeros(4)

    def add(self, sample: GraphSample) -> None:
        """Let a sample wait; raises StructureError if it can never fit."""
        check_fits(sample, self.shape)
        used = np.array([1, len(sample.structure), sample.rows, sample.edges]) / self._budget
        self.pending.append(sample)
        self._used.append(used)
        self._waiting += used

    def pop_full(self) -> list[GraphSample] | None:
        """Return samples for a batch, or None while too few wait to choose from."""
        return self._take() if self._waiting.max() >= LOOK_AHEAD else None

    def pop_any(self) -> list[GraphSample] | None:
        """Return a batch of what waits, or None when nothing waits: for the end of a finite pass."""
        return self._take() if self.pending else None

    def _take(self) -> list[GraphSample]:
        chosen = choose(np.array(self._used))
        taken = [self.pending[index] for index in chosen]
        gone = set(chosen)
        self.pending = [sample for index, sample in enumerate(self.pending) if index not in gone]
        self._used = [used for index, used in enumerate(self._used) if index not in gone]
        # Summed anew, not subtracted: rounding would make the batches depend on how long the run has been going.
        self._waiting = np.array(self._used).sum(axis=0) if self._used else np.zeros(4)
        return taken


def choose(used: np.ndarray) -> list[int]:
    """Return which of the waiting items fill a batch, given their shares of its budgets [items, B] in order of arrival.

    The first half is filled in turn, so that nothing waits for ever and the mixture stays as it came. Then whatever
    leaves the smallest rest, in the sum of squares over the budgets, is taken as long as anything fits (the norm-based
    greedy rule for vector bin packing of Panigrahy et al. 2011): dense structures where slots are left over, sparse
    ones where atoms are. The first budget, the number of structures, need not be used up and does not count.
    """
    chosen: list[int] = []
    left = np.ones(used.shape[1])
    for index in range(len(used)):
        if (left < IN_TURN).any():
            break
        if (used[index] <= left + 1e-9).all():
            chosen.append(index)
            left = left - used[index]
    free = np.ones(len(used), dtype=bool)
    free[chosen] = False
    while True:
        rest = left - used
        possible = free & (rest >= -1e-9).all(axis=1)
        if not possible.any():
            return chosen
        index = int(np.argmin(np.where(possible, (rest[:, 1:] ** 2).sum(axis=1), np.inf)))
        chosen.append(index)
        free[index] = False
        left = left - used[index]


def pack(samples: Iterable[GraphSample], shape: BatchShape) -> Iterator[list[GraphSample]]:
    """Pack a finite series of samples: yields the samples of each batch, each sample once."""
    packer = Packer(shape)
    for sample in samples:
        packer.add(sample)
        while (packed := packer.pop_full()) is not None:
            yield packed
    while (packed := packer.pop_any()) is not None:
        yield packed
