"""Packing of structures into batches of a fixed size, chosen among several that wait."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from hydrazero.shards.errors import StructureError
from hydrazero.shards.graphs.graph import BatchShape, GraphSample
from hydrazero.shards.graphs.neighbours import ROW_SLOTS

LOOK_AHEAD = 5
"""Number of batches that the waiting structures would fill, so that there is one for every gap."""

IN_TURN = 0.5
"""Fraction of a batch that is filled with the structures that wait longest; the rest with those that fit best."""


def fits(sample: GraphSample, shape: BatchShape) -> bool:
    """Return whether a batch can hold the sample."""
    return len(sample.structure) <= shape.atoms and sample.rows <= shape.rows and sample.edges <= shape.most_edges


def check_fits(sample: GraphSample, shape: BatchShape) -> None:
    """Raise StructureError, with the settings that the sample needs, if a batch cannot hold it."""
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
        f"{sample.structure.source_id} has {n} atoms, {sample.edges} edges and {slots} neighbour slots, which is more "
        f"than a batch can hold; set {wanted}.",
    )


class Packer:
    """Collects samples, and returns lists of them that fill a batch.

    The batches depend only on the order of the samples, so that the same stream gives the same batches. A checkpoint
    must contain `pending` in addition to the position in the stream.
    """

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        self._budget = np.array([shape.structures, shape.atoms, shape.rows, shape.most_edges], dtype=np.float64)
        self.pending: list[GraphSample] = []
        """Samples that wait, in the order in which they were added."""
        self._used: list[np.ndarray] = []
        """Fractions of the budgets that each waiting sample takes, [4]."""
        self._waiting = np.zeros(4)

    def add(self, sample: GraphSample) -> None:
        """Add a sample to those that wait; raise StructureError if no batch can hold it."""
        check_fits(sample, self.shape)
        used = np.array([1, len(sample.structure), sample.rows, sample.edges]) / self._budget
        self.pending.append(sample)
        self._used.append(used)
        self._waiting += used

    def pop_full(self) -> list[GraphSample] | None:
        """Return the samples of a batch, or None while too few wait to choose from."""
        return self._take() if self._waiting.max() >= LOOK_AHEAD else None

    def pop_any(self) -> list[GraphSample] | None:
        """Return the samples of a batch even if few wait, for the end of a pass; None if none wait."""
        return self._take() if self.pending else None

    def _take(self) -> list[GraphSample]:
        chosen = choose(np.array(self._used))
        taken = [self.pending[index] for index in chosen]
        gone = set(chosen)
        self.pending = [sample for index, sample in enumerate(self.pending) if index not in gone]
        self._used = [used for index, used in enumerate(self._used) if index not in gone]
        # Summed again instead of subtracted: rounding errors would make batches depend on the length of the run.
        self._waiting = np.array(self._used).sum(axis=0) if self._used else np.zeros(4)
        return taken


def choose(used: np.ndarray) -> list[int]:
    """Return the indices of the waiting items that fill a batch.

    `used` [items, budgets] are the fractions of the budgets that each item takes, in the order of arrival. The first
    half of the batch is filled in that order, so that no item waits for ever and the mixture of tasks is kept. Then,
    as long as an item fits, the one with the smallest remainder is taken, by the sum of squares over the budgets (the
    norm-based greedy rule for vector bin packing of Panigrahy et al. 2011): dense structures if slots are left, sparse
    ones if atoms are. The first budget, the number of structures, need not be used up and is ignored in that sum.
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
    """Yield the samples of each batch for a finite series of samples; each sample appears once."""
    packer = Packer(shape)
    for sample in samples:
        packer.add(sample)
        while (packed := packer.pop_full()) is not None:
            yield packed
    while (packed := packer.pop_any()) is not None:
        yield packed
