"""Reference energies: one energy per atom of each element, fitted to total energies by least squares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray


def reference_energies(triangle: NDArray[np.float64]) -> dict[str, float]:
    """Fit one energy per element (eV), in float64, from the triangular factor of the rows (compositions, energy).

    The factor R of a QR decomposition has the same least-squares problem as the rows themselves, and factors of parts
    of the rows can be stacked and factored again (tall-skinny QR, Demmel et al. 2012). Where the compositions do not
    determine the energies of single elements, the solution closest to the mean energy per atom is taken; its sums are
    right for every composition in the data.
    """
    counts, energies = triangle[:, :-1], triangle[:, -1]
    numbers = np.flatnonzero(np.abs(counts).max(axis=0, initial=0.0) > 0)
    counts = counts[:, numbers]
    if not len(numbers):
        return {}  # a task without energies
    atoms = counts.sum(axis=1)
    # The mean energy per atom is subtracted first, so that the least-norm part is small and loses no digits.
    mean = float(np.dot(atoms, energies) / np.dot(atoms, atoms))
    correction, *_ = np.linalg.lstsq(counts, energies - mean * atoms, rcond=1e-10)
    return {chemical_symbols[z]: float(mean + c) for z, c in zip(numbers, correction, strict=True)}


def reference_table(references: Mapping[str, float]) -> NDArray[np.float64]:
    """Return energies in eV by atomic number, [119]; NaN for elements without one."""
    table = np.full(119, np.nan)
    for symbol, energy in references.items():
        table[atomic_numbers[symbol]] = energy
    return table
