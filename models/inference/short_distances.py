"""Pairs of atoms that are closer than any two atoms of their elements in the training data of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from hydrazero.models.task_facts import TaskFacts
from hydrazero.shards.convert.element_pairs import ELEMENTS
from hydrazero.shards.graphs.graph import GraphBatch, GraphSample
from hydrazero.shards.structure import FloatArray

ROUNDING = 1e-3
"""Distances in Å that differ by less are equal: positions of a batch may be float32."""


@dataclass(frozen=True, kw_only=True)
class ShortPair:
    """The pair of a structure that is shortest in units of the smallest distance in the training data of a task."""

    structure: int
    """Place of the structure among those that were looked at."""
    task: int
    """Place of the task among those that are asked."""
    atoms: tuple[int, int]
    """Numbers of the two atoms in the structure; the same number twice stands for an atom and its periodic image."""
    numbers: tuple[int, int]
    """Atomic numbers of the two atoms."""
    distance: float
    """Distance of the two atoms in Å."""

    def text(self, facts: TaskFacts, name: str) -> str:
        """Return a sentence on the pair without a full stop; `name` is that of the structure, `facts` the task's."""
        elements = "-".join(chemical_symbols[z] for z in sorted(self.numbers))
        first, second = self.atoms
        if first == second:
            which = f"atom {first} of {name} and its periodic image ({elements})"
        else:
            which = f"atoms {first} and {second} of {name} ({elements})"
        nearest = facts.closest.get(elements)
        known = f"have a smallest distance of {nearest:.2f} Å" if nearest else "are never neighbours"
        digits = 3 if nearest and f"{self.distance:.2f}" == f"{nearest:.2f}" else 2
        return (
            f"{which} are {self.distance:.{digits}f} Å apart; these elements {known} in the training data of task "
            f"'{facts.name}'"
        )


def knows_distances(facts: TaskFacts) -> bool:
    """Return whether the smallest distances in the training data of a task are known."""
    return bool(facts.closest) or facts.closest_within > 0.0


def bounds_table(facts: TaskFacts, cutoff: float) -> FloatArray:
    """Return the distances in Å below which pairs of elements are unlike the training data of a task: [119, 119].

    They are at most `cutoff`, up to which pairs are known, and 0 for elements that the task was not trained on.
    """
    known = np.zeros(ELEMENTS, dtype=bool)
    known[[atomic_numbers[symbol] for symbol in facts.elements]] = True
    table = np.where(known[:, None] & known, facts.closest_within, 0.0)
    if facts.closest:
        first, second = np.array([[atomic_numbers[end] for end in pair.split("-")] for pair in facts.closest]).T
        table[first, second] = table[second, first] = list(facts.closest.values())
    bounds: FloatArray = np.maximum(np.minimum(table, cutoff) - ROUNDING, 0.0)
    return bounds


class ShortDistances:
    """Find the structures of batches in which atoms are closer than in the training data of tasks."""

    def __init__(self, tasks: Sequence[TaskFacts], cutoff: float) -> None:
        """Look for pairs within `cutoff` in Å that are too close for one of the tasks."""
        self.tasks = list(tasks)
        self._bounds = np.stack([bounds_table(facts, cutoff) for facts in tasks])
        self._loosest = self._bounds.max(axis=0)
        self._on_device: torch.Tensor | None = None

    def of_samples(self, samples: Sequence[GraphSample]) -> list[ShortPair]:
        """Return the shortest pair of each structure and task that has one, for samples with their neighbours."""
        if not samples or not self._loosest.any():
            return []
        numbers = [sample.structure.numbers for sample in samples]
        lower = np.concatenate([each.take(sample.pairs.first) for each, sample in zip(numbers, samples, strict=True)])
        upper = np.concatenate([each.take(sample.pairs.second) for each, sample in zip(numbers, samples, strict=True)])
        distances = np.concatenate([sample.pairs.lengths(sample.structure.positions) for sample in samples])
        short = np.flatnonzero(distances < self._loosest.take(lower.astype(np.int64) * ELEMENTS + upper))
        if not len(short):
            return []
        starts = np.cumsum([0, *(len(sample.pairs.first) for sample in samples)])
        structure = np.searchsorted(starts, short, side="right") - 1
        found = [(samples[s].pairs, n) for s, n in zip(structure, short - starts[structure], strict=True)]
        atoms = np.array([[pairs.first[n], pairs.second[n]] for pairs, n in found])
        return self._worst(structure, atoms, np.stack([lower[short], upper[short]], axis=1), distances[short])

    def of_batch(self, batch: GraphBatch) -> list[ShortPair]:
        """Return what `of_samples` does for a batch whose neighbours were found on its device."""
        if not self._loosest.any():
            return []
        if self._on_device is None or self._on_device.device != batch.positions.device:
            self._on_device = torch.from_numpy(self._loosest).to(batch.positions.device)
        between = batch.positions[batch.neighbours] + batch.shifts - batch.positions[batch.row_atom].unsqueeze(1)
        bounds = self._on_device[batch.numbers[batch.row_atom].unsqueeze(1), batch.numbers[batch.neighbours]]
        distances = between.square().sum(2).sqrt()
        row, slot = torch.nonzero((distances < bounds) & batch.slot_mask, as_tuple=True)
        ends = torch.stack([batch.row_atom[row], batch.neighbours[row, slot]], dim=1)
        structure = batch.structure[ends[:, 0]]
        start = (batch.n_atoms.cumsum(0) - batch.n_atoms)[structure]
        found = (structure, ends - start.unsqueeze(1), batch.numbers[ends], distances[row, slot].double())
        return self._worst(*(each.cpu().numpy() for each in found))

    def _worst(
        self,
        structure: NDArray[np.int64],
        atoms: NDArray[np.int64],
        numbers: NDArray[np.integer],
        distances: FloatArray,
    ) -> list[ShortPair]:
        """Return the worst pair of each structure and task.

        The C candidates have `structure` [C], `atoms` [C, 2] in the structure, `numbers` [C, 2] and `distances` [C] Å.
        """
        worst = []
        for task, bounds in enumerate(self._bounds if len(structure) else []):
            bound = bounds[numbers[:, 0], numbers[:, 1]]
            short = np.flatnonzero(distances < bound)
            short = short[np.lexsort((distances[short] / bound[short], structure[short]))]
            for pair in short[np.unique(structure[short], return_index=True)[1]].tolist():
                ends, elements = atoms[pair].tolist(), numbers[pair].tolist()
                worst.append(
                    ShortPair(
                        structure=int(structure[pair]),
                        task=task,
                        atoms=(min(ends), max(ends)),
                        numbers=(elements[0], elements[1]),
                        distance=float(distances[pair]),
                    )
                )
        return sorted(worst, key=lambda pair: (pair.structure, pair.task))
