"""What a screen knows of a structure before the model sees it: the tasks that can take it, neighbours, references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase.geometry import complete_cell
from ase.symbols import Symbols
from numpy.typing import NDArray

from hydrazero.models.inference.potential import Potential
from hydrazero.models.screening.settings import ScreenSettings
from hydrazero.models.screening.sources import Item, structure_at
from hydrazero.models.task_facts import known_elements, reference_table
from hydrazero.shards.errors import StructureError
from hydrazero.shards.graphs.graph import GraphSample, graph_sample
from hydrazero.shards.graphs.neighbours import HalfPairs
from hydrazero.shards.structure import Structure

REMEMBERED = 100_000
"""Compositions whose formula, references and tasks a worker keeps."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A structure that is not computed."""

    index: int
    source_id: str
    formula: str
    atoms: int
    kind: str
    """Short stable word, by which they are counted."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What follows from the atomic numbers alone; T tasks of the screen."""

    formula: str
    known: NDArray[np.bool_]
    """Whether the task has seen all elements, [T]."""
    reference: NDArray[np.float64]
    """Sum of the task's reference energies, eV, [T]."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is known of the S structures of a batch before it is computed."""

    index: NDArray[np.int64]
    source_ids: list[str]
    formulas: list[str]
    atoms: NDArray[np.int32]
    usable: NDArray[np.bool_]
    """Whether a task can take a structure, [S, T]."""
    reference: NDArray[np.float64]
    """eV, [S, T]."""
    structures: list[Structure]
    """Where they have been relaxed; else none."""

    def refused(self, place: int, kind: str, reason: str) -> Refused:
        """Refuse the structure at a place."""
        return Refused(
            index=int(self.index[place]),
            source_id=self.source_ids[place],
            formula=self.formulas[place],
            atoms=int(self.atoms[place]),
            kind=kind,
            reason=reason,
        )


class Lookup:
    """What the tasks say to structures."""

    def __init__(self, potential: Potential, settings: ScreenSettings) -> None:
        self.potential, self.settings = potential, settings
        self.rows_per_atom: float | None = None
        """Of neighbour slots, an estimate, where neighbours are found on the model's device and not by the workers."""
        facts = [potential.facts(task) for task in settings.tasks]
        self._references = reference_table(facts).numpy().T
        self._known = known_elements(facts).numpy().T
        self._needs_multiplicity = np.array([task.charge_spin and task.multiplicity_known for task in facts])
        self._compositions: dict[bytes, Composition] = {}

    def composition(self, structure: Structure) -> Composition:
        """What follows from a structure's atomic numbers."""
        key = structure.numbers.tobytes()
        if key not in self._compositions:
            if len(self._compositions) >= REMEMBERED:
                self._compositions.clear()
            numbers = structure.numbers.astype(np.int64)
            self._compositions[key] = Composition(
                formula=str(Symbols(numbers).get_chemical_formula()),
                known=np.asarray(self._known[numbers].all(axis=0)),
                reference=self._references[numbers].sum(axis=0),
            )
        return self._compositions[key]

    def usable(self, structure: Structure) -> NDArray[np.bool_]:
        """Whether each task can take a structure, [T]."""
        known = self.composition(structure).known
        return known if structure.multiplicity else known & ~self._needs_multiplicity

    def sample(self, item: Item) -> GraphSample:
        """Read an item and find its neighbours; raises StructureError for what cannot be computed."""
        structure = structure_at(item)
        if len(structure) > self.settings.max_atoms:
            most = self.settings.max_atoms
            raise TooStrange(structure, "too_large", f"has {len(structure)} atoms, more than --max-atoms {most}")
        if not self.usable(structure).any():
            reasons = (self.potential.why_not(structure, task) for task in self.settings.tasks)
            raise TooStrange(structure, "unseen", next(reason for reason in reasons if reason))
        if self.rows_per_atom is None:
            return graph_sample(structure, 0, self.potential.cutoff, origin=(item.index,))
        rows = math.ceil(self.rows_per_atom * len(structure))
        if structure.pbc.any() and not structure.pbc.all():  # the engine wants three independent vectors
            along = np.where(structure.pbc[:, None], structure.cell, 0.0)
            structure = replace(structure, cell=complete_cell(along))
        none = np.zeros(0, dtype=np.int64)
        pairs = HalfPairs(first=none, second=none, shift=None, degrees=np.zeros(len(structure), dtype=np.int64))
        return GraphSample(structure=structure, pairs=pairs, task=0, rows=rows, edges=0, origin=(item.index,))

    def rows(self, packed: Sequence[GraphSample], names: dict[int, str]) -> Rows:
        """What is known of the structures of a batch; `names` gives up those of its structures."""
        structures = [sample.structure for sample in packed]
        compositions = [self.composition(structure) for structure in structures]
        index = np.array([sample.origin[0] for sample in packed], dtype=np.int64)
        return Rows(
            index=index,
            source_ids=[names.pop(number) for number in index.tolist()],
            formulas=[composition.formula for composition in compositions],
            atoms=np.array([len(structure) for structure in structures], dtype=np.int32),
            usable=np.stack([self.usable(structure) for structure in structures]),
            reference=np.stack([composition.reference for composition in compositions]),
            structures=structures if self.settings.relax else [],
        )


class TooStrange(StructureError):
    """A sound structure that no task can take."""

    def __init__(self, structure: Structure, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.structure = structure
