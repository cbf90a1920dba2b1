"""Samples for the model made of the structures of a screen: supporting tasks, neighbours and reference energies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase.geometry import complete_cell
from ase.symbols import Symbols
from numpy.typing import NDArray

from hydrazero.models.inference.extrapolation import ExtrapolationWarning, ignored_conditions, undetermined_energy
from hydrazero.models.inference.potential import Potential
from hydrazero.models.inference.short_distances import ShortDistances, ShortPair
from hydrazero.models.inference.user_warnings import warn_user
from hydrazero.models.screening.settings import ScreenSettings
from hydrazero.models.screening.sources import Item, read_structure
from hydrazero.models.task_facts import known_elements, reference_table
from hydrazero.shards.errors import StructureError
from hydrazero.shards.graphs.graph import GraphSample, graph_sample
from hydrazero.shards.graphs.neighbours import HalfPairs
from hydrazero.shards.structure import Structure

COMPOSITIONS_KEPT = 100_000
"""Maximum number of compositions whose formula, reference energies and supporting tasks a worker keeps in memory."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A structure that is not computed, and why."""

    index: int
    source_id: str
    formula: str
    atoms: int
    kind: str
    """Short word that never changes, by which rejections are counted."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Properties that follow from the atomic numbers alone, for the T tasks of the screen."""

    formula: str
    known: NDArray[np.bool_]
    """Whether the task was trained on all elements, [T]."""
    reference: NDArray[np.float64]
    """Sum of the task's reference energies, eV, [T]."""
    arbitrary: NDArray[np.bool_]
    """Whether the task's training data leaves the total energy open, [T]."""


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """What is known of the S structures of a batch before the model computes them, for T tasks."""

    index: NDArray[np.int64]
    """Number of each structure in all sources, [S]."""
    source_ids: list[str]
    formulas: list[str]
    atoms: NDArray[np.int32]
    """Number of atoms of each structure, [S]."""
    supported: NDArray[np.bool_]
    """Whether the task supports the structure, [S, T]."""
    reference: NDArray[np.float64]
    """Sum of the task's reference energies, eV, [S, T]."""
    structures: list[Structure]
    """The relaxed structures; empty in a screen that does not relax."""
    short: list[ShortPair]
    """Pairs of atoms that are closer than in the training data of a task, at most one for each structure and task."""

    def rejection(self, place: int, kind: str, reason: str) -> Rejection:
        """Return the rejection of the structure at a place in the batch."""
        return Rejection(
            index=int(self.index[place]),
            source_id=self.source_ids[place],
            formula=self.formulas[place],
            atoms=int(self.atoms[place]),
            kind=kind,
            reason=reason,
        )


class SampleBuilder:
    """Make samples of structures, and reject those that no task supports."""

    def __init__(self, potential: Potential, settings: ScreenSettings) -> None:
        self.potential, self.settings = potential, settings
        self.rows_per_atom: float | None = None
        """Estimated number of rows of neighbour slots per atom if neighbours are found on the model's device; None if
        workers find them."""
        self._facts = facts = [potential.facts(task) for task in settings.tasks]
        self.short_distances = ShortDistances(facts, potential.cutoff)
        self._said_ignored = False
        self._said_arbitrary = np.zeros(len(facts), dtype=bool)
        self._references = reference_table(facts).numpy().T
        self._known = known_elements(facts).numpy().T
        self._needs_multiplicity = np.array([task.charge_spin and task.multiplicity_known for task in facts])
        self._compositions: dict[bytes, Composition] = {}

    def composition(self, structure: Structure) -> Composition:
        """Return the properties that follow from a structure's atomic numbers."""
        key = structure.numbers.tobytes()
        if key not in self._compositions:
            if len(self._compositions) >= COMPOSITIONS_KEPT:
                self._compositions.clear()
            facts, numbers = self._facts, structure.numbers.astype(np.int64)
            self._compositions[key] = Composition(
                formula=str(Symbols(numbers).get_chemical_formula()),
                known=np.asarray(self._known[numbers].all(axis=0)),
                reference=self._references[numbers].sum(axis=0),
                arbitrary=np.array([undetermined_energy(each, structure.numbers, "") is not None for each in facts]),
            )
        return self._compositions[key]

    def supported(self, structure: Structure) -> NDArray[np.bool_]:
        """Return whether each task supports a structure, [T]."""
        known = self.composition(structure).known
        return known if structure.multiplicity else known & ~self._needs_multiplicity

    def sample(self, item: Item) -> GraphSample:
        """Read an item and find its neighbours; raise StructureError if it cannot be computed."""
        structure, unread = read_structure(item), None if item.unread is None else item.unread()
        if len(structure) > self.settings.max_atoms:
            reason = f"has {len(structure)} atoms, more than --max-atoms {self.settings.max_atoms}"
            raise RejectedStructureError(structure, "too_large", reason)
        supported = self.supported(structure)
        if not supported.any():
            reason = self.potential.why_none(structure, self.settings.tasks) or "is not supported by any task"
            raise RejectedStructureError(structure, "unseen", reason)
        self._look_at_composition(structure, supported, item.source_id)
        self._look_at_conditions(structure, supported, item.source_id, unread)
        if self.rows_per_atom is None:
            try:
                return graph_sample(structure, 0, self.potential.cutoff, origin=(item.index,))
            except StructureError as error:
                raise RejectedStructureError(structure, error.reason, str(error)) from error
        rows = math.ceil(self.rows_per_atom * len(structure))
        if structure.pbc.any() and not structure.pbc.all():  # the search on the device needs three independent vectors
            along = np.where(structure.pbc[:, None], structure.cell, 0.0)
            structure = replace(structure, cell=complete_cell(along))
        none = np.zeros(0, dtype=np.int64)
        pairs = HalfPairs(first=none, second=none, shift=None, degrees=np.zeros(len(structure), dtype=np.int64))
        return GraphSample(structure=structure, pairs=pairs, task=0, rows=rows, edges=0, origin=(item.index,))

    def _look_at_composition(self, structure: Structure, supported: NDArray[np.bool_], name: str) -> None:
        """Warn of the first structure, for each task that supports it, whose energy the training data leaves open."""
        arbitrary = self.composition(structure).arbitrary & supported & ~self._said_arbitrary
        for place in np.flatnonzero(arbitrary):
            text = undetermined_energy(self._facts[place], structure.numbers, name)
            warn_user(f"{text}; further structures are not named.", ExtrapolationWarning)
        self._said_arbitrary |= arbitrary

    def _look_at_conditions(
        self, structure: Structure, supported: NDArray[np.bool_], name: str, unread: str | None
    ) -> None:
        """Warn of the first structure whose charge or spin a task that supports it ignores."""
        for place in [] if self._said_ignored else np.flatnonzero(supported):
            if (ignored := ignored_conditions(self._facts[place], structure, name, unread)) is not None:
                self._said_ignored = True
                warn_user(f"{ignored}; further structures are not named.", ExtrapolationWarning)
                return

    def rows(self, packed: Sequence[GraphSample], names: dict[int, str]) -> BatchRows:
        """Return what is known of the structures of a batch, and remove their source ids from `names`."""
        structures = [sample.structure for sample in packed]
        compositions = [self.composition(structure) for structure in structures]
        index = np.array([sample.origin[0] for sample in packed], dtype=np.int64)
        return BatchRows(
            index=index,
            source_ids=[names.pop(number) for number in index.tolist()],
            formulas=[composition.formula for composition in compositions],
            atoms=np.array([len(structure) for structure in structures], dtype=np.int32),
            supported=np.stack([self.supported(structure) for structure in structures]),
            reference=np.stack([composition.reference for composition in compositions]),
            structures=structures if self.settings.relax else [],
            short=self.short_distances.of_samples(packed),  # none if neighbours are found on the model's device
        )


class RejectedStructureError(StructureError):
    """A structure that was read without an error, but that is not computed."""

    def __init__(self, structure: Structure, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.structure = structure
