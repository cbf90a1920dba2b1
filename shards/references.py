"""Reference energies per element, and the statistics of labels once they are subtracted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from hydrazero.shards.manifest import LabelRange
from hydrazero.shards.structure import Structure


def composition_matrix(structures: Sequence[Structure], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Atoms of each element (ascending atomic `numbers`) in each structure, [structures, elements]."""
    return np.stack([np.bincount(s.numbers, minlength=119)[numbers] for s in structures]).astype(np.float64)


def fit_reference_energies(structures: Sequence[Structure]) -> dict[str, float]:
    """Fit one energy per element to total energies by least squares (eV), in float64.

    Where compositions leave it open how to share an energy out, the solution of least norm around the mean energy per
    atom is taken: its sums are right for every composition that was seen.
    """
    labelled = [s for s in structures if s.energy is not None]
    numbers = np.unique(np.concatenate([s.numbers for s in labelled])).astype(np.int64)
    counts = composition_matrix(labelled, numbers)
    energies = np.array([s.energy for s in labelled])
    # The mean energy per atom goes first, so that the least-norm part is small and loses no digits.
    mean = energies.sum() / counts.sum()
    correction, *_ = np.linalg.lstsq(counts, energies - mean * counts.sum(axis=1), rcond=1e-10)
    return {chemical_symbols[z]: float(mean + c) for z, c in zip(numbers, correction, strict=True)}


def residual_per_atom(structures: Sequence[Structure], references: Mapping[str, float]) -> NDArray[np.float64]:
    """Energies less references, eV per atom, of the structures that have an energy."""
    table = np.zeros(119)
    for symbol, energy in references.items():
        table[atomic_numbers[symbol]] = energy
    return np.array([(s.energy - table[s.numbers].sum()) / len(s) for s in structures if s.energy is not None])


def label_range(values: NDArray[np.float64]) -> LabelRange:
    """Count and range of a label's values; raises ValueError if there are none."""
    return LabelRange(
        count=int(values.size),
        minimum=float(values.min()),
        maximum=float(values.max()),
        mean=float(values.mean()),
        rms=float(np.sqrt(np.mean(values**2))),
    )


def label_ranges(structures: Sequence[Structure], references: Mapping[str, float]) -> dict[str, LabelRange]:
    """Ranges of all labels that the structures have: energies per atom, forces and stress per component."""
    ranges = {
        "energy_per_atom": label_range(np.array([s.energy / len(s) for s in structures if s.energy is not None])),
        "energy_residual_per_atom": label_range(residual_per_atom(structures, references)),
    }
    forces = [s.forces.reshape(-1) for s in structures if s.forces is not None]
    stress = [s.stress.reshape(-1) for s in structures if s.stress is not None]
    for name, parts in (("forces", forces), ("stress", stress)):
        if parts:
            ranges[name] = label_range(np.concatenate(parts))
    return ranges
