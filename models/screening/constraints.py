"""What a relaxation may change: directions in which atoms may move, and along which the cell may be strained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane, FixScaled
from ase.geometry import complete_cell

from hydrazero.shards.errors import StructureError
from hydrazero.shards.structure import FloatArray, Structure

ROOM = 20.0
"""Empty space in Å, beyond two cutoffs, that surrounds a structure along directions without periodicity."""
TINY = 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class Freedom:
    """What may change in a structure of A atoms."""

    atoms: FloatArray
    """Matrices that project an atom's displacement onto the directions in which it may move, [A, 3, 3]."""
    strain: FloatArray
    """Matrix that projects onto the directions along which the cell may be strained, [3, 3]; zero where it is fixed."""


def freedom_of(structure: Structure, cutoff: float) -> Freedom:
    """Return what a relaxation of a structure may change, where atoms interact up to `cutoff` in Å.

    A structure with fixed atoms keeps its cell, since a strain would move them. Others are strained along the lattice
    vectors through which atoms interact with their periodic images, so not along vacuum. Raises StructureError for
    constraints that do not concern single atoms, such as fixed bonds.
    """
    atoms = _movable(structure)
    strain = np.zeros((3, 3))
    if not structure.constraints:
        strain = _onto(box_of(structure, cutoff)[structure.pbc & ~_separated(structure, cutoff)])
    return Freedom(atoms=atoms, strain=strain)


def box_of(structure: Structure, cutoff: float) -> FloatArray:
    """Return three lattice vectors of a structure, Å.

    Along directions without periodicity they are so long that its images do not interact.
    """
    box: FloatArray = complete_cell(np.where(structure.pbc[:, None], structure.cell, 0.0))
    for axis in np.flatnonzero(~structure.pbc):
        along = box[axis] / np.linalg.norm(box[axis])
        box[axis] = along * (np.ptp(structure.positions @ along) + 2.0 * cutoff + ROOM)
    return box


def _separated(structure: Structure, cutoff: float) -> np.ndarray:
    """Return for each lattice vector whether a gap wider than the cutoff separates images along it, [3]."""
    inverse = np.linalg.inv(box_of(structure, cutoff))
    fractions = np.sort((structure.positions @ inverse) % 1.0, axis=0)
    gaps = np.diff(np.concatenate([fractions, fractions[:1] + 1.0]), axis=0).max(axis=0)
    separated: np.ndarray = gaps / np.linalg.norm(inverse, axis=0) > cutoff
    return separated


def _movable(structure: Structure) -> FloatArray:
    """Return the projectors that all constraints of a structure leave, [A, 3, 3]."""
    fixed = np.zeros((len(structure), 3, 3))
    for constraint in structure.constraints:
        forbidden = np.eye(3) - _allowed(constraint, structure)
        fixed[np.unique(constraint.get_indices())] += forbidden
    if not structure.constraints:
        return fixed + np.eye(3)
    # Each term is the projector onto what one constraint forbids; what no term forbids is the null space of their sum.
    values, vectors = np.linalg.eigh(fixed)
    kept = vectors * (np.abs(values) < TINY)[:, None, :]
    return np.asarray(kept @ vectors.transpose(0, 2, 1))


def _allowed(constraint: Any, structure: Structure) -> FloatArray:
    """Return the projector onto the directions that a constraint leaves to its atoms, [3, 3]."""
    if isinstance(constraint, FixAtoms):
        return np.zeros((3, 3))
    if isinstance(constraint, FixCartesian):
        return np.diag((~np.asarray(constraint.mask, dtype=bool)).astype(float))
    if isinstance(constraint, FixScaled):
        return _onto(structure.cell[~np.asarray(constraint.mask, dtype=bool)])
    if isinstance(constraint, FixedLine):
        return _onto(np.asarray(constraint.dir, dtype=float).reshape(1, 3))
    if isinstance(constraint, FixedPlane):
        return np.eye(3) - _onto(np.asarray(constraint.dir, dtype=float).reshape(1, 3))
    raise StructureError(
        "not_relaxed", f"it has a constraint of the type {type(constraint).__name__}, which --relax does not keep"
    )


def _onto(vectors: FloatArray) -> FloatArray:
    """Return the projector onto the space that vectors [N, 3] span, [3, 3]."""
    if len(vectors) == 3:
        return np.eye(3)
    return np.asarray(np.linalg.pinv(vectors) @ vectors)
