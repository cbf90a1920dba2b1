"""One labelled structure, as every reader hands it over."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hydrazero.shards.errors import StructureError

MAX_ATOMIC_NUMBER = 118
MIN_DISTANCE = 0.05
"""Å; two atoms closer than this are at the same place for every practical purpose."""

MAX_MAGNITUDE = 1e10
"""Å, eV/Å or eV/Å³; nothing physical is larger, float32 shards would hold infinity for what is far larger."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """A structure and its labels in eV, Å, eV/Å, eV/Å³; labels that a source lacks are None."""

    numbers: NDArray[np.uint8]
    """Atomic numbers [atoms]."""
    positions: FloatArray
    """Å, [atoms, 3]."""
    cell: FloatArray
    """Å, [3, 3], rows are lattice vectors; zeros for a molecule."""
    pbc: NDArray[np.bool_]
    """[3]."""
    energy: float | None = None
    """Total energy, eV."""
    forces: FloatArray | None = None
    """eV/Å, [atoms, 3]."""
    stress: FloatArray | None = None
    """eV/Å³, [3, 3], symmetric, positive under tension (ASE sign)."""
    charge: int = 0
    """Total charge, e."""
    multiplicity: int = 0
    """Spin multiplicity 2S+1; 0 where the source does not say."""
    targets: dict[str, FloatArray] = field(default_factory=dict)
    """Other quantities of the whole, of shape () or (3,)."""
    atom_targets: dict[str, FloatArray] = field(default_factory=dict)
    """Other quantities of atoms, [atoms] or [atoms, 3]; NaN where an atom lacks one."""
    source_id: str = ""
    """Where it came from: 'file#frame'."""

    def __len__(self) -> int:
        return len(self.numbers)

    def geometry_hash(self) -> bytes:
        """Return 16 bytes that are equal for structures with the same atoms, positions, cell, charge and spin.

        Positions are rounded to 1e-6 Å, so that a change of text format does not hide a duplicate.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.numbers.tobytes())
        periodic_cell = self.cell * self.pbc[:, None]
        for values in (self.positions, periodic_cell):
            # Adding 0 turns -0 into 0, which has other bytes.
            digest.update((np.round(values * 1e6).astype(np.int64) + 0).tobytes())
        digest.update(self.pbc.tobytes())
        digest.update(np.array([self.charge, self.multiplicity], dtype=np.int64).tobytes())
        return digest.digest()


def check_structure(structure: Structure) -> None:
    """Raise StructureError, naming the fault, if shapes, values, cell or distances cannot be right."""
    n = len(structure.numbers)
    if n == 0:
        raise StructureError("no_atoms", "the structure has no atoms")
    if structure.positions.shape != (n, 3):
        raise StructureError(
            "positions_shape", f"positions have shape {structure.positions.shape}, not {(n, 3)} for {n} atoms"
        )
    numbers = structure.numbers.astype(np.int64)
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        bad = int(numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)][0])
        raise StructureError("unknown_element", f"atomic number {bad} is no element (1 to {MAX_ATOMIC_NUMBER})")
    if not _usable(structure.positions).all():
        raise StructureError("non_finite_positions", f"a position is NaN, infinite or above {MAX_MAGNITUDE:.0e} Å")
    _check_labels(structure, n)
    _check_cell(structure)
    _check_distances(structure)


def _usable(values: FloatArray) -> NDArray[np.bool_]:
    """Where values are numbers of a magnitude that shards can hold; NaN compares as False."""
    return np.abs(values) <= MAX_MAGNITUDE


def _check_labels(structure: Structure, n: int) -> None:
    if structure.energy is not None and not np.isfinite(structure.energy):
        raise StructureError("non_finite_energy", f"the energy is {structure.energy}")
    if structure.forces is not None:
        if structure.forces.shape != (n, 3):
            raise StructureError(
                "forces_shape", f"forces have shape {structure.forces.shape}, not {(n, 3)} for {n} atoms"
            )
        if not _usable(structure.forces).all():
            atom = int(np.argwhere(~_usable(structure.forces))[0, 0])
            raise StructureError(
                "non_finite_forces", f"the force on atom {atom} is NaN, infinite or above {MAX_MAGNITUDE:.0e} eV/Å"
            )
    if structure.stress is not None:
        if structure.stress.shape != (3, 3):
            raise StructureError("stress_shape", f"stress has shape {structure.stress.shape}, not (3, 3)")
        if not _usable(structure.stress).all():
            raise StructureError("non_finite_stress", f"the stress is NaN, infinite or above {MAX_MAGNITUDE:.0e} eV/Å³")


def _check_cell(structure: Structure) -> None:
    if structure.cell.shape != (3, 3) or not np.isfinite(structure.cell).all():
        raise StructureError("bad_cell", f"the cell is not a finite 3 x 3 matrix (shape {structure.cell.shape})")
    if not structure.pbc.any():
        return
    vectors = structure.cell[structure.pbc]
    lengths = np.linalg.norm(vectors, axis=1)
    if (lengths < 1e-3).any():
        raise StructureError("zero_cell", "pbc is set along a cell vector of length zero")
    # Volume spanned by the periodic vectors relative to a right-angled cell: 0 when they are linearly dependent.
    unit = vectors / lengths[:, None]
    if np.sqrt(max(np.linalg.det(unit @ unit.T), 0.0)) < 1e-4:
        raise StructureError("singular_cell", "the periodic cell vectors are linearly dependent")


def _check_distances(structure: Structure) -> None:
    """Raise if two atoms coincide, across periodic boundaries too."""
    positions = structure.positions
    if len(positions) == 1 and not structure.pbc.any():
        return
    points, owner = positions, np.arange(len(positions))
    if structure.pbc.any():
        vectors = structure.cell[structure.pbc]
        # Wrap into the cell, then copy only the atoms within MIN_DISTANCE of a face to the opposite side.
        inverse = np.linalg.pinv(vectors)
        fractions = positions @ inverse
        points = positions - np.floor(fractions) @ vectors
        fractions = points @ inverse
        margin = MIN_DISTANCE * np.linalg.norm(inverse, axis=0)
        for axis in range(len(vectors)):
            low = fractions[:, axis] < margin[axis]
            points = np.concatenate([points, points[low] + vectors[axis]])
            owner = np.concatenate([owner, owner[low]])
            shifted = fractions[low]
            shifted[:, axis] += 1.0
            fractions = np.concatenate([fractions, shifted])
    pairs = cKDTree(points).query_pairs(MIN_DISTANCE, output_type="ndarray")
    if len(pairs):
        first, second = sorted(int(owner[k]) for k in pairs[0])
        raise StructureError("coincident_atoms", f"atoms {first} and {second} are at the same place")
