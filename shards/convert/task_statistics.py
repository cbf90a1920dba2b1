"""Statistics of a task, summed shard by shard in the order of the shards, so that they do not depend on the workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from hydrazero.shards.block import StructureBlock
from hydrazero.shards.convert.checks.lengths import RATIO_EDGES, smallest_ratio
from hydrazero.shards.convert.element_pairs import ELEMENTS, pair_places
from hydrazero.shards.convert.splits import is_isolated_atom
from hydrazero.shards.graphs.neighbours import ROW_SLOTS, half_pairs
from hydrazero.shards.manifest_parts import Degrees, Histogram, LabelRange, Outlier
from hydrazero.shards.structure import Structure

NAMED_OUTLIERS = 10

FORCE_EDGES = np.concatenate([[0.0], np.logspace(-4, 3, 57)])
"""Edges of the bins of force norms in eV/Å, eight bins per decade."""
STRESS_EDGES = np.logspace(-8, 10, 289)
"""Edges of the bins of stresses in eV/Å³, sixteen bins per decade."""


@dataclass(kw_only=True)
class LabelSums:
    """Count, range and sums of the values of a label, updated as values are added."""

    count: int = 0
    minimum: float = np.inf
    maximum: float = -np.inf
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Add values of any shape; NaN stands for a label that is absent."""
        finite = values[~np.isnan(values)].astype(np.float64).reshape(-1)
        if finite.size:
            squares = float(np.dot(finite, finite))
            low, high = float(finite.min()), float(finite.max())
            self.merge(LabelSums(count=finite.size, minimum=low, maximum=high, total=finite.sum(), squares=squares))

    def merge(self, other: LabelSums) -> None:
        """Add the sums of other values."""
        self.count += int(other.count)
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.total += float(other.total)
        self.squares += other.squares

    def label_range(self) -> LabelRange:
        """Return count, range, mean and root mean square of the values, of which there must be one."""
        return LabelRange(
            count=self.count,
            minimum=self.minimum,
            maximum=self.maximum,
            mean=self.total / self.count,
            rms=float(np.sqrt(self.squares / self.count)),
        )


@dataclass(kw_only=True)
class Statistics:
    """Statistics of some blocks of a task."""

    elements: Counter[int] = field(default_factory=Counter)
    """Atomic number -> number of atoms."""
    trained: set[int] = field(default_factory=set)
    """Atomic numbers in the training split."""
    sizes: Counter[int] = field(default_factory=Counter)
    """Atoms per structure -> number of structures."""
    periodic: int = 0
    charged: int = 0
    """Number of structures with a charge, or a multiplicity other than 1."""
    multiplicity_known: int = 0
    """Number of structures whose multiplicity is known."""
    moments: dict[str, LabelSums] = field(default_factory=dict)
    """Sums over the training split of 'energy_per_atom', 'forces' and 'stress'."""
    targets: dict[str, LabelSums] = field(default_factory=dict)
    """Sums over the training split of the targets; extensive ones per atom."""
    triangle: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 120)))
    """Triangular factor of the rows (atoms of each element 0 to 118, energy in eV) of the training split, which is all
    that the least-squares fit of reference energies needs."""
    isolated: dict[int, float] = field(default_factory=dict)
    """Atomic number -> energy of a neutral isolated atom of the training split in eV, the lowest of several."""
    forces: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(FORCE_EDGES) - 1, dtype=np.int64))
    """Number of atoms of the training split by the norm of the force, in the bins of FORCE_EDGES."""
    strongest: list[Outlier] = field(default_factory=list)
    """Structures with the largest forces, of all splits."""
    stresses: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(STRESS_EDGES) - 1, dtype=np.int64))
    """Number of structures of all splits by the largest component of a stress that is not zero, in the bins of
    STRESS_EDGES."""
    most_stressed: list[Outlier] = field(default_factory=list)
    """Structures with the largest components of the stress, of all splits."""
    unused_stresses: int = 0
    """Number of structures with a stress, but no volume to which it refers."""
    degrees: dict[float, Degrees] = field(default_factory=dict)
    """Cutoff in Å -> numbers of neighbours within it."""
    closest: NDArray[np.float32] = field(default_factory=lambda: np.full(ELEMENTS**2, np.inf, dtype=np.float32))
    """Smallest distances of pairs of elements in the training split, Å, [119 * 119]; see `pair_places`."""
    length_ratios: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(RATIO_EDGES) - 1, dtype=np.int64))
    """Number of structures of all splits by the smallest ratio of a distance to the sum of the covalent radii, in the
    bins of RATIO_EDGES."""

    def add(self, block: StructureBlock, split: str, cutoffs: Sequence[float], extensive: Collection[str] = ()) -> None:
        """Add the structures of a block; targets named in `extensive` are divided by the number of atoms."""
        self.elements.update(Counter(block.numbers.tolist()))
        self.sizes.update(Counter(block.n_atoms.tolist()))
        self.periodic += int(block.pbc.any(axis=1).sum())
        self.charged += int(((block.charge != 0) | (block.multiplicity > 1)).sum())
        self.multiplicity_known += int((block.multiplicity > 0).sum())
        if split == "train":
            self.trained.update(np.unique(block.numbers).tolist())
            self._add_labels(block)
            for name, values in {**block.targets, **block.atom_targets}.items():
                per = block.n_atoms if name in extensive else 1.0
                self.targets.setdefault(name, LabelSums()).add(values / per)
        if block.forces is not None:
            norms = np.linalg.norm(block.forces.astype(np.float64), axis=1)
            if split == "train":
                self.forces += np.histogram(np.minimum(norms[~np.isnan(norms)], FORCE_EDGES[-1]), FORCE_EDGES)[0]
            largest = np.maximum.reduceat(np.nan_to_num(norms, nan=-1.0), block.starts[:-1])
            found = [Outlier(source_id=block.names[i], value=float(largest[i])) for i in _top(largest)]
            self.strongest = strongest([*self.strongest, *(entry for entry in found if entry.value >= 0)])
        if block.stress is not None:
            self._add_stresses(block)
        for cutoff in cutoffs:
            self.degrees.setdefault(cutoff, Degrees())
        for index in range(len(block)):
            structure = block.structure(index)
            self._add_pairs(structure, split, cutoffs)
            if split == "train":
                self._add_isolated(structure, cutoffs)

    def _add_labels(self, block: StructureBlock) -> None:
        stress = None if block.stress is None else block.stress[~np.isnan(block.stress).any((1, 2)) & block.has_volume]
        labels = {"energy_per_atom": block.energy / block.n_atoms, "forces": block.forces, "stress": stress}
        for name, values in labels.items():
            if values is not None:
                self.moments.setdefault(name, LabelSums()).add(values)
        labelled = ~np.isnan(block.energy)
        rows = np.column_stack([compositions(block)[labelled], block.energy[labelled]])
        self._add_rows(rows)

    def _add_stresses(self, block: StructureBlock) -> None:
        assert block.stress is not None
        largest = np.abs(block.stress.astype(np.float64)).max(axis=(1, 2))  # NaN where there is no stress
        self.unused_stresses += int((~np.isnan(largest) & ~block.has_volume).sum())
        largest = np.where(block.has_volume, np.nan_to_num(largest, nan=0.0), 0.0)
        self.stresses += np.histogram(largest[largest > 0], STRESS_EDGES)[0]
        found = [Outlier(source_id=block.names[i], value=float(largest[i])) for i in _top(largest) if largest[i] > 0]
        self.most_stressed = strongest([*self.most_stressed, *found])

    def _add_isolated(self, structure: Structure, cutoffs: Sequence[float]) -> None:
        if structure.energy is not None and not structure.charge and is_isolated_atom(structure, cutoffs):
            number = int(structure.numbers[0])
            self.isolated[number] = min(structure.energy, self.isolated.get(number, np.inf))

    def _add_rows(self, rows: NDArray[np.float64]) -> None:
        stacked: Any = np.linalg.qr(np.concatenate([self.triangle, rows]), mode="r")
        self.triangle = stacked

    def _add_pairs(self, structure: Structure, split: str, cutoffs: Sequence[float]) -> None:
        if not cutoffs:
            return
        pairs = half_pairs(structure.positions, structure.cell, structure.pbc, max(cutoffs))
        between = structure.positions[pairs.second] - structure.positions[pairs.first]
        distances = np.linalg.norm(between if pairs.shift is None else between + pairs.shift, axis=1)
        for cutoff in cutoffs:
            near = distances <= cutoff
            ends = np.concatenate([pairs.first[near], pairs.second[near]])
            degrees = np.bincount(ends, minlength=len(structure))
            self.degrees[cutoff].add(degrees, structure.source_id, ROW_SLOTS)
        if (ratio := smallest_ratio(structure, pairs, distances, max(cutoffs))) is not None:
            self.length_ratios += np.histogram(np.clip(ratio, RATIO_EDGES[0], RATIO_EDGES[-1]), RATIO_EDGES)[0]
        if split == "train":
            places = pair_places(structure.numbers[pairs.first], structure.numbers[pairs.second])
            np.minimum.at(self.closest, places, distances.astype(np.float32))

    def merge(self, other: Statistics) -> None:
        """Add the statistics of other blocks."""
        self.elements.update(other.elements)
        self.trained.update(other.trained)
        self.sizes.update(other.sizes)
        self.periodic += other.periodic
        self.charged += other.charged
        self.multiplicity_known += other.multiplicity_known
        for name, moments in other.moments.items():
            self.moments.setdefault(name, LabelSums()).merge(moments)
        for name, moments in other.targets.items():
            self.targets.setdefault(name, LabelSums()).merge(moments)
        self._add_rows(other.triangle)
        self.forces = self.forces + other.forces
        self.length_ratios = self.length_ratios + other.length_ratios
        self.closest = np.minimum(self.closest, other.closest)
        self.strongest = strongest([*self.strongest, *other.strongest])
        for number, energy in other.isolated.items():
            self.isolated[number] = min(energy, self.isolated.get(number, np.inf))
        self.stresses = self.stresses + other.stresses
        self.most_stressed = strongest([*self.most_stressed, *other.most_stressed])
        self.unused_stresses += other.unused_stresses
        for cutoff, degrees in other.degrees.items():
            self.degrees.setdefault(cutoff, Degrees()).merge(degrees)


def isolated_atoms(total: Statistics) -> dict[str, float]:
    """Return the energy of the isolated atom of each element of which there is one, in eV."""
    return {chemical_symbols[number]: energy for number, energy in sorted(total.isolated.items())}


def _top(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.argsort(-values, kind="stable")[:NAMED_OUTLIERS]


def strongest(entries: Iterable[Outlier]) -> list[Outlier]:
    """Return the entries with the largest absolute values; entries of equal value stay in their order."""
    return sorted(entries, key=lambda entry: -abs(entry.value))[:NAMED_OUTLIERS]


def compositions(block: StructureBlock) -> NDArray[np.float64]:
    """Return the number of atoms of each element 0 to 118 in each structure, [S, 119]."""
    owner = np.repeat(np.arange(len(block)), block.n_atoms)
    flat = np.bincount(owner * ELEMENTS + block.numbers, minlength=ELEMENTS * len(block))
    return flat.reshape(len(block), ELEMENTS).astype(np.float64)


def histogram_of(values: Iterable[NDArray[np.float64]], moments: LabelSums, bins: int = 60) -> Histogram:
    """Return a histogram of values given in parts, over their range within five standard deviations of the mean."""
    mean = moments.total / moments.count
    spread = 5 * np.sqrt(max(moments.squares / moments.count - mean**2, 0.0)) or 1e-3
    low, high = max(moments.minimum, mean - spread), min(moments.maximum, mean + spread)
    edges = np.linspace(low, high if high > low else low + 1e-3, bins + 1)
    counts = np.zeros(bins, dtype=np.int64)
    for part in values:
        counts += np.histogram(np.clip(part[~np.isnan(part)], edges[0], edges[-1]), edges)[0]
    return Histogram(edges=edges.tolist(), counts=counts.tolist())
