"""Blocks: up to 256 structures in columns, which one WebDataset sample holds.

Columns are concatenated over structures. Labels that a structure lacks are NaN; a column that every structure lacks is
absent. Energies and cells are float64; positions, forces and stress have the precision of the conversion file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from hydrazero.shards.structure import Structure
from hydrazero.shards.targets import ATOM_PREFIX, STRUCTURE_PREFIX

BLOCK_STRUCTURES = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class StructureBlock:
    """S structures with A atoms altogether, in columns."""

    n_atoms: NDArray[np.int32]
    """Number of atoms of each structure, [S]."""
    numbers: NDArray[np.uint8]
    """Atomic numbers, [A]."""
    positions: NDArray[np.floating]
    """Positions in Å, [A, 3]."""
    cell: NDArray[np.float64]
    """Lattice vectors as rows in Å, [S, 3, 3]; zeros for a molecule."""
    pbc: NDArray[np.bool_]
    """Whether each structure is periodic along each lattice vector, [S, 3]."""
    energy: NDArray[np.float64]
    """Total energies in eV, [S]; NaN where absent."""
    charge: NDArray[np.int16]
    """Total charges in e, [S]."""
    multiplicity: NDArray[np.int16]
    """Spin multiplicities 2S+1, [S]; 0 where unknown."""
    forces: NDArray[np.floating] | None = None
    """Forces in eV/Å, [A, 3]; NaN where absent."""
    stress: NDArray[np.floating] | None = None
    """Stresses in eV/Å³, [S, 3, 3]; NaN where absent."""
    source_ids: NDArray[np.uint8] | None = None
    """UTF-8 bytes of all source ids, joined by newlines."""
    targets: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Name -> further quantities of structures, [S] or [S, 3]; NaN where absent."""
    atom_targets: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Name -> further quantities of atoms, [A] or [A, 3]; NaN where absent."""

    def __len__(self) -> int:
        return len(self.n_atoms)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all columns."""
        return sum(column.nbytes for column in columns_of(self).values())

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Index of the first atom of each structure, and the number of atoms at the end, [S + 1]."""
        return np.concatenate([[0], np.cumsum(self.n_atoms, dtype=np.int64)])

    @cached_property
    def names(self) -> list[str]:
        """Source id of each structure."""
        if self.source_ids is None:
            return [""] * len(self)
        return self.source_ids.tobytes().decode().split("\n")

    def structure(self, index: int) -> Structure:
        """Return a copy of one structure."""
        atoms = slice(int(self.starts[index]), int(self.starts[index + 1]))
        energy = float(self.energy[index])
        forces = None if self.forces is None else self.forces[atoms].astype(np.float64)
        stress = None if self.stress is None else self.stress[index].astype(np.float64)
        return Structure(
            numbers=self.numbers[atoms].copy(),
            positions=self.positions[atoms].astype(np.float64),
            cell=self.cell[index].copy(),
            pbc=self.pbc[index].astype(np.bool_),
            energy=None if np.isnan(energy) else energy,
            forces=None if forces is None or np.isnan(forces).any() else forces,
            stress=None if stress is None or np.isnan(stress).any() else stress,
            charge=int(self.charge[index]),
            multiplicity=int(self.multiplicity[index]),
            targets=_present({name: values[index] for name, values in self.targets.items()}),
            atom_targets=_present({name: values[atoms] for name, values in self.atom_targets.items()}),
            source_id=self.names[index],
        )


def _present(values: dict[str, Any]) -> dict[str, NDArray[np.float64]]:
    """Copy the values that are not NaN throughout."""
    arrays = {name: np.array(value, dtype=np.float64) for name, value in values.items()}
    return {name: array for name, array in arrays.items() if not np.isnan(array).all()}


def block_from_structures(structures: Sequence[Structure], *, float_dtype: str = "float32") -> StructureBlock:
    """Return a block of structures; `float_dtype` ('float32' or 'float64') is that of positions, forces and stress."""
    dtype = np.dtype(float_dtype)
    structures = structures if dtype == np.float64 else [_near_origin(s) for s in structures]
    nan_stress = np.full((3, 3), np.nan)
    forces = stress = None
    if any(s.forces is not None for s in structures):
        rows = [s.forces if s.forces is not None else np.full((len(s), 3), np.nan) for s in structures]
        forces = np.concatenate(rows).astype(dtype)
    if any(s.stress is not None for s in structures):
        stress = np.stack([s.stress if s.stress is not None else nan_stress for s in structures]).astype(dtype)
    names = "\n".join(s.source_id.replace("\n", " ") for s in structures)
    return StructureBlock(
        n_atoms=np.array([len(s) for s in structures], dtype=np.int32),
        numbers=np.concatenate([s.numbers for s in structures]).astype(np.uint8),
        positions=np.concatenate([s.positions for s in structures]).astype(dtype),
        cell=np.stack([s.cell for s in structures]).astype(np.float64),
        pbc=np.stack([s.pbc for s in structures]).astype(np.bool_),
        energy=np.array([np.nan if s.energy is None else s.energy for s in structures], dtype=np.float64),
        charge=np.array([s.charge for s in structures], dtype=np.int16),
        multiplicity=np.array([s.multiplicity for s in structures], dtype=np.int16),
        forces=forces,
        stress=stress,
        source_ids=np.frombuffer(names.encode(), dtype=np.uint8),
        targets=_joined([s.targets for s in structures], [()] * len(structures)),
        atom_targets=_joined([s.atom_targets for s in structures], [(len(s),) for s in structures]),
    )


def _joined(
    targets: Sequence[dict[str, NDArray[np.float64]]], owners: Sequence[tuple[int, ...]]
) -> dict[str, NDArray[np.float64]]:
    """Join targets of structures (owner ()) or of atoms (owner (n,)); a structure that lacks a target gets NaN."""
    joined = {}
    for name in sorted({name for own in targets for name in own}):
        example = next(own[name] for own in targets if name in own)
        tail = example.shape[len(owners[0]) :]
        rows = [own.get(name, np.full((*owner, *tail), np.nan)) for own, owner in zip(targets, owners, strict=True)]
        joined[name] = np.concatenate([row.reshape(-1, *tail) for row in rows])
    return joined


FAR = 100.0
"""Distance from the origin in Å, up to which float32 holds coordinates to 1e-5 Å."""


def _near_origin(structure: Structure) -> Structure:
    """Move a structure that is far from the origin by whole cells, and along open directions to its mean."""
    if np.abs(structure.positions).max(initial=0.0) <= FAR:
        return structure
    positions = structure.positions.copy()
    if structure.pbc.any():
        vectors = structure.cell[structure.pbc]
        positions -= np.floor(positions @ np.linalg.pinv(vectors)) @ vectors
    if not structure.pbc.all():
        open_part = np.eye(3)
        if structure.pbc.any():
            vectors = structure.cell[structure.pbc]
            open_part -= np.linalg.pinv(vectors) @ vectors
        positions -= positions.mean(axis=0) @ open_part
    return replace(structure, positions=positions)


def columns_of(block: StructureBlock) -> dict[str, NDArray[Any]]:
    """Return the columns of a block by name, without those that are absent."""
    columns = {item.name: getattr(block, item.name) for item in fields(block) if not item.name.endswith("targets")}
    columns |= {STRUCTURE_PREFIX + name: value for name, value in block.targets.items()}
    columns |= {ATOM_PREFIX + name: value for name, value in block.atom_targets.items()}
    return {name: np.ascontiguousarray(value) for name, value in columns.items() if value is not None}


def block_from(columns: dict[str, NDArray[Any]]) -> StructureBlock:
    """Return the block with the given columns; raise TypeError if one is missing or unknown."""

    def under(prefix: str) -> dict[str, NDArray[Any]]:
        return {name.removeprefix(prefix): value for name, value in columns.items() if name.startswith(prefix)}

    plain = {name: value for name, value in columns.items() if not name.startswith((ATOM_PREFIX, STRUCTURE_PREFIX))}
    return StructureBlock(**plain, targets=under(STRUCTURE_PREFIX), atom_targets=under(ATOM_PREFIX))


def encode_block(block: StructureBlock) -> bytes:
    """Serialise a block as safetensors."""
    return safetensors.numpy.save(columns_of(block))
