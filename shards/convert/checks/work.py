"""Work of the labels between successive frames: forces along displacements, and stress along strains.

Where frames of a source follow each other closely, the energy changes by minus the mean force times the displacement,
plus the volume times the mean stress times the strain. This is exact for a quadratic energy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.structure import FloatArray, Structure

MOST_MOVED = 0.25
"""Largest displacement of an atom in Å between two frames that are compared."""
MOST_STRAINED = 0.06
"""Largest component of the strain between two frames that are compared."""
SMALL_SHARE = 0.1
"""Work of the forces, relative to that of the stress, up to which a pair says something about the stress."""
PAIRS_OF_CHUNK = 64
"""Number of pairs that are kept of each chunk of frames."""
FORCES, STRESS = 0, 1
"""Kinds of pairs: those that say something about the forces, and about the stress."""


class WorkPairs:
    """Pairs of successive frames whose labels can be compared."""

    def __init__(self) -> None:
        self._last: Structure | None = None
        self._rows: list[tuple[int, float, float, int]] = []

    def add(self, structure: Structure) -> None:
        """Compare a frame with the one before it, unless there are enough pairs."""
        last, self._last = self._last, structure
        if last is not None and len(self._rows) < PAIRS_OF_CHUNK and (row := _work(last, structure)) is not None:
            self._rows.append(row)

    def table(self) -> FloatArray:
        """Return the kind, the work in eV, the change of the energy in eV and the atoms of each pair, [pairs, 4]."""
        return np.array(self._rows, dtype=np.float64).reshape(-1, 4)


def _work(first: Structure, second: Structure) -> tuple[int, float, float, int] | None:
    """Return a pair's row of the table; None if the frames are too different, or have no labels to compare."""
    if first.energy is None or second.energy is None or not _same_atoms(first, second):
        return None
    strain, moved = _change(first, second)
    largest = float(np.abs(moved).max())
    if largest > MOST_MOVED or np.abs(strain).max() > MOST_STRAINED:
        return None
    change, atoms = second.energy - first.energy, len(first)
    of_forces = 0.0
    if first.forces is not None and second.forces is not None:
        of_forces = -0.5 * float(np.sum((first.forces + second.forces) * moved))
    elif largest > 1e-6:
        return None
    if not strain.any():
        return (FORCES, of_forces, change, atoms) if largest > 1e-6 else None
    if first.stress is None or second.stress is None or not first.volume or not second.volume:
        return None
    of_stress = 0.5 * float(np.sum((first.volume * first.stress + second.volume * second.stress) * strain))
    return (STRESS, of_stress, change - of_forces, atoms) if abs(of_forces) <= SMALL_SHARE * abs(of_stress) else None


def _same_atoms(first: Structure, second: Structure) -> bool:
    same_state = (first.charge, first.multiplicity) == (second.charge, second.multiplicity)
    return (
        len(first) == len(second)
        and same_state
        and bool((first.numbers == second.numbers).all())
        and bool((first.pbc == second.pbc).all())
    )


def _change(first: Structure, second: Structure) -> tuple[FloatArray, FloatArray]:
    """Return the strain [3, 3] between two frames, and the displacements [atoms, 3] in Å beyond the strained first."""
    start, strain = first.positions, np.zeros((3, 3))
    if first.volume and second.volume and np.abs(first.cell - second.cell).max() > 1e-6:
        deformation = np.linalg.solve(first.cell, second.cell)
        start = first.positions @ deformation
        strain = 0.5 * (deformation + deformation.T) - np.eye(3)
    moved = second.positions - start
    if second.pbc.any():
        vectors: NDArray[np.float64] = second.cell[second.pbc]
        moved = moved - np.round(moved @ np.linalg.pinv(vectors)) @ vectors
    return strain, moved
