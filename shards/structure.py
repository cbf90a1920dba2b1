"""A labelled structure, which all readers yield, and its checks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hydrazero.shards.errors import StructureError

MAX_ATOMIC_NUMBER = 118
MIN_DISTANCE = 0.05
"""Distance in Å below which two atoms are taken to be at the same place."""

MAX_MAGNITUDE = 1e10
"""Largest accepted number in Å, eV/Å or eV/Å³; far larger ones would become infinite in float32."""

SMALLEST_VOLUME = 0.05
"""Volume in Å³ that a periodic structure has for each atom at least; hydrogen in the core of Jupiter has about 1 Å³. An
atom in a cell that is far smaller would have millions of neighbours."""

MAX_WHOLE = 32767
"""Largest absolute charge and multiplicity, since blocks store them as int16."""
WHOLE = 1e-6
"""Largest distance from an integer; sums of partial charges, for example, miss it by rounding errors."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """A structure and its labels in eV, Å, eV/Å, eV/Å³; labels that a source lacks are None."""

    numbers: NDArray[np.uint8]
    """Atomic numbers [atoms]."""
    positions: FloatArray
    """Positions in Å, [atoms, 3]."""
    cell: FloatArray
    """Lattice vectors as rows in Å, [3, 3]; zeros for a molecule."""
    pbc: NDArray[np.bool_]
    """Whether the structure is periodic along each lattice vector, [3]."""
    energy: float | None = None
    """Total energy in eV."""
    forces: FloatArray | None = None
    """Forces in eV/Å, [atoms, 3]."""
    stress: FloatArray | None = None
    """Stress in eV/Å³, [3, 3], symmetric, positive under tension as in ASE."""
    charge: int = 0
    """Total charge in e."""
    multiplicity: int = 0
    """Spin multiplicity 2S+1; 0 if it is unknown."""
    targets: dict[str, FloatArray] = field(default_factory=dict)
    """Name -> further quantities of the structure, of shape () or (3,)."""
    atom_targets: dict[str, FloatArray] = field(default_factory=dict)
    """Name -> further quantities of atoms, [atoms] or [atoms, 3]; NaN where an atom lacks one."""
    source_id: str = ""
    """Origin of the structure: 'file#frame'."""
    constraints: tuple[Any, ...] = ()
    """ASE's constraints on its atoms in the source, such as atoms that are fixed; shards do not hold them."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def volume(self) -> float:
        """Volume in Å³ to which the stress refers: that of the cell of a structure that is periodic in some direction.

        It is 0 where there is no such volume: for molecules, and for a cell without three independent vectors.
        """
        return float(volumes(self.cell[None], self.pbc[None])[0])

    def geometry_hash(self) -> bytes:
        """Return 16 bytes that are equal for structures with equal atoms, positions, cells, charges and multiplicities.

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


def volumes(cells: FloatArray, pbc: NDArray[np.bool_]) -> FloatArray:
    """Return `Structure.volume` of S structures in Å³, [S], from their cells [S, 3, 3] and pbc [S, 3]."""
    found: FloatArray = np.abs(np.linalg.det(cells))
    return np.where(pbc.any(axis=1) & (found > 1e-4 * np.linalg.norm(cells, axis=2).prod(axis=1)), found, 0.0)


def atomic_numbers_of(values: ArrayLike) -> NDArray[np.uint8]:
    """Return atomic numbers as uint8; raise StructureError for any that the cast would change into another element."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StructureError(
            "atomic_numbers_shape", f"the atomic numbers cannot be read as numbers ({error})"
        ) from error
    if numbers.ndim != 1:
        raise StructureError("atomic_numbers_shape", f"the atomic numbers have shape {numbers.shape}, not (atoms,)")
    bad = numbers[~((numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER)) | (numbers != np.round(numbers))]
    if bad.size:
        raise StructureError(
            "unknown_element", f"atomic number {bad[0]:g} is not an element (1 to {MAX_ATOMIC_NUMBER})"
        )
    return numbers.astype(np.uint8)


def charge_of(value: Any, name: str = "the charge") -> int:
    """Return a total charge in e, 0 if the value is None; raise StructureError unless it is one whole number."""
    return 0 if value is None else _whole(value, "charge", name)


def multiplicity_of(value: Any, name: str = "the multiplicity") -> int:
    """Return a spin multiplicity 2S+1, 0 (unknown) if the value is None.

    Raises StructureError unless it is one whole number of at least 1.
    """
    if value is None:
        return 0
    found = _whole(value, "multiplicity", name)
    if found < 1:
        raise StructureError("bad_multiplicity", f"{name} is {found}; a spin multiplicity 2S+1 is at least 1")
    return found


def _whole(value: Any, kind: str, name: str) -> int:
    try:
        numbers = np.asarray(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise StructureError(f"{kind}_shape", f"{name} is {value!r}, not a whole number") from error
    if numbers.size != 1:
        raise StructureError(f"{kind}_shape", f"{name} has {numbers.size} numbers, not one")
    number = float(numbers[0])
    if not np.isfinite(number) or abs(number - round(number)) > WHOLE:
        raise StructureError(f"bad_{kind}", f"{name} is {number}, not a whole number")
    if abs(number) > MAX_WHOLE:
        raise StructureError(f"bad_{kind}", f"{name} is {number:g}, beyond {MAX_WHOLE}")
    return round(number)


def check_structure(structure: Structure) -> None:
    """Raise StructureError for wrong shapes, non-finite or huge values, singular cells, or coincident atoms."""
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
        raise StructureError("unknown_element", f"atomic number {bad} is not an element (1 to {MAX_ATOMIC_NUMBER})")
    if not _usable(structure.positions).all():
        raise StructureError("non_finite_positions", f"a position is NaN, infinite or above {MAX_MAGNITUDE:.0e} Å")
    _check_labels(structure, n)
    _check_cell(structure)
    _check_distances(structure)


def _usable(values: FloatArray) -> NDArray[np.bool_]:
    """Return where values are numbers that shards can hold; False for NaN."""
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
    if structure.cell.shape != (3, 3) or not _usable(structure.cell).all():
        raise StructureError(
            "bad_cell",
            f"the cell is not a 3 x 3 matrix of numbers up to {MAX_MAGNITUDE:.0e} (shape {structure.cell.shape})",
        )
    if structure.pbc.any() and (fault := cell_fault(structure.cell, structure.pbc, structure.positions)) is not None:
        raise fault


def cell_fault(cell: FloatArray, pbc: NDArray[np.bool_], positions: FloatArray) -> StructureError | None:
    """Return what is wrong with the periodic vectors of a cell for atoms at `positions`, or None if nothing is.

    At least one element of `pbc` is true, and all numbers are finite.
    """
    vectors = cell[pbc]
    lengths = np.linalg.norm(vectors, axis=1)
    if (lengths < 1e-3).any():
        return StructureError("zero_cell", "pbc is set along a cell vector of length zero")
    # Volume spanned by the periodic vectors relative to a right-angled cell; it is 0 if they are linearly dependent.
    unit = vectors / lengths[:, None]
    skewed = np.sqrt(max(np.linalg.det(unit @ unit.T), 0.0))
    if skewed < 1e-4:
        return StructureError("singular_cell", "the periodic cell vectors are linearly dependent")
    if skewed * lengths.prod() >= SMALLEST_VOLUME * len(positions):
        return None
    volume = volume_per_atom(vectors, positions, 1.0)
    if volume >= SMALLEST_VOLUME:
        return None
    return StructureError(
        "too_dense", f"the cell has {volume:.2g} Å³ for each atom, and no matter is denser than {SMALLEST_VOLUME} Å³"
    )


def volume_per_atom(vectors: FloatArray, positions: FloatArray, thickness: float) -> float:
    """Return the volume in Å³ for each of the atoms at `positions` in a cell with one to three periodic vectors.

    Along the open directions it is as thick as the atoms are far apart, but at least `thickness` in Å.
    """
    volume = float(np.sqrt(max(np.linalg.det(vectors @ vectors.T), 0.0)))
    if len(vectors) < 3:
        across = np.linalg.svd(vectors)[2][len(vectors) :]
        volume *= float(np.maximum(np.ptp(positions @ across.T, axis=0), thickness).prod())
    return volume / len(positions)


def _check_distances(structure: Structure) -> None:
    """Raise StructureError if two atoms coincide, also across periodic boundaries."""
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
