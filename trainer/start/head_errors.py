"""Errors of a model's heads on the structures of a task that none of them was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.potential import DEFAULT_SHAPE, Potential, shape_for
from hydrazero.models.task_facts import TaskFacts
from hydrazero.shards.convert.references import reference_energies
from hydrazero.shards.graphs.graph import GraphSample
from hydrazero.shards.location import Location
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, split_places
from hydrazero.trainer.start.initial_weights import start_from
from hydrazero.trainer.start.unit_check import Likeness, energy_likeness, likeness

COMPARED = 100
"""Number of training structures on which heads are compared."""
FITTED = 20_000
"""Maximum number of training structures to which reference energies are fitted."""


@dataclass(frozen=True, kw_only=True)
class HeadErrors:
    """Errors of a head on a sample of a task's training structures."""

    name: str
    """Name of the head; 'mean' for the mean of several."""
    fidelity: str
    """Level of theory of the task that the head was trained on."""
    force_mae: float | None
    """Mean absolute error of force components, eV/Å; None if there are no forces or the head predicts none."""
    energy_mae: float | None
    """Mean absolute error of the energy per atom, eV, after reference energies are fitted to the sample; None without
    energies."""
    lacks: tuple[str, ...]
    """Elements of the task that the head was not trained on."""
    forces: Likeness | None
    """Comparison of the sizes of force components."""
    energies: Likeness | None
    """Comparison of the sizes of energies without references."""

    @property
    def order(self) -> tuple[bool, float]:
        """Key by which heads are sorted, nearest first: the error of forces, or of energies if there are no forces."""
        errors = [error for error in (self.force_mae, self.energy_mae) if error is not None]
        return self.force_mae is None, errors[0] if errors else float("inf")


def head_model(start: AtomisticModel, facts: TaskFacts, rows: Sequence[int]) -> AtomisticModel:
    """Return the model with a single head for a task that may be new to it: the mean of the heads at `rows`."""
    attention = tuple(name for name in start.settings.attention_targets if name in facts.targets)
    model = AtomisticModel(start.settings.model_copy(update={"attention_targets": attention}), [facts]).to(start.dtype)
    start_from(model, start, {0: rows})
    return model.eval()


def spread_samples(shards: Location, cutoff: float, most: int) -> list[GraphSample]:
    """Return at most `most` training structures that are spread evenly over the shards; raise ShardError."""
    reader = SplitReader(StreamSettings(folders=(shards,), cutoff=cutoff, shape=DEFAULT_SHAPE), "train")
    total = reader.readers[0].manifest.structures("train")
    places = islice(split_places(reader), 0, None, max(-(-total // most), 1))
    return list(reader.samples(places))


def compositions_of(samples: Sequence[GraphSample]) -> NDArray[np.float64]:
    """Return the number of atoms of each element, 0 to 118, in each structure, [S, 119]."""
    rows = [np.bincount(sample.structure.numbers, minlength=119) for sample in samples]
    return np.array(rows, dtype=np.float64).reshape(-1, 119)


def refitted(
    counts: NDArray[np.float64], energies: NDArray[np.float64], before: Mapping[str, float]
) -> dict[str, float]:
    """Fit reference energies, eV, to energies without interactions, eV [S], of compositions [S, 119].

    Differences that the compositions do not determine stay as they were `before`, if that has all elements; otherwise
    they are as in `reference_energies`.
    """
    elements = np.flatnonzero(counts.sum(axis=0))
    known = np.zeros(119)
    for symbol, energy in before.items():
        known[atomic_numbers[symbol]] = energy
    if set(elements) - {atomic_numbers[symbol] for symbol in before}:
        known[:] = 0.0
    rows = np.column_stack([counts, energies - counts @ known])
    triangle: Any = np.linalg.qr(rows, mode="r")
    changes = reference_energies(triangle)
    return {symbol: energy + float(known[atomic_numbers[symbol]]) for symbol, energy in changes.items()}


def interactions(model: AtomisticModel, samples: Sequence[GraphSample]) -> NDArray[np.float64]:
    """Return the energies that the only head of a model predicts, without references, eV [S], in the samples' order."""
    potential, found = Potential(model), np.empty(len(samples))
    numbered = [replace(sample, origin=(number,)) for number, sample in enumerate(samples)]
    for packed, batch in potential.batches(numbered, shape_for(numbered)):
        energies = potential.member_energies(batch).mean(2)[:, 0]
        found[[sample.origin[0] for sample in packed]] = energies[: len(packed)]
    return found


@dataclass(kw_only=True)
class _Compared:
    """Labels and predictions of structures."""

    samples: list[GraphSample] = field(default_factory=list)
    """Structures that have energies."""
    energies: list[tuple[float, float]] = field(default_factory=list)
    """Label and prediction of the energy of each of them in eV; predictions have no reference energies."""
    forces: list[NDArray[np.float64]] = field(default_factory=list)
    """Labels and predictions of the forces of each structure with N atoms, eV/Å, [2, 3 N]."""


def _compared(model: AtomisticModel, samples: Sequence[GraphSample]) -> _Compared:
    potential, found = Potential(model), _Compared()
    for packed, batch in potential.batches(samples, shape_for(samples)):
        for sample, row in zip(packed, potential.rows(packed, batch), strict=True):
            energy, forces = sample.structure.energy, sample.structure.forces
            if energy is not None and row["energy"] is not None:
                found.samples.append(sample)
                found.energies.append((energy, row["energy"] - row["reference_energy"]))
            if forces is not None and row["forces"] is not None:
                found.forces.append(np.stack([forces.ravel(), row["forces"].ravel()]))
    return found


def head_errors(
    start: AtomisticModel, facts: TaskFacts, rows: Sequence[int], samples: Sequence[GraphSample]
) -> HeadErrors:
    """Return the errors of the mean of the heads at `rows` on some structures of a task with these facts."""
    old = [start.tasks[row] for row in rows]
    name, fidelity = (old[0].name, old[0].fidelity) if len(old) == 1 else ("mean", "")
    seen = {symbol for task in old for symbol in task.elements}
    found = _compared(head_model(start, facts, rows), samples)
    forces = np.concatenate(found.forces, axis=1) if found.forces else None
    energy_mae, energies = None, None
    if found.energies:
        counts, (true, predicted) = compositions_of(found.samples), np.array(found.energies).T
        references = refitted(counts, true - predicted, old[0].reference_energies if len(old) == 1 else {})
        rest = true - predicted - counts @ np.array([references.get(symbol, 0.0) for symbol in chemical_symbols])
        energy_mae = float(np.mean(np.abs(rest) / counts.sum(axis=1)))
        energies = energy_likeness(counts, true, predicted)
    return HeadErrors(
        name=name,
        fidelity=fidelity,
        force_mae=None if forces is None else float(np.mean(np.abs(forces[0] - forces[1]))),
        energy_mae=energy_mae,
        lacks=tuple(sorted(set(facts.elements) - seen)),
        forces=None if forces is None else likeness(forces[0], forces[1]),
        energies=energies,
    )
