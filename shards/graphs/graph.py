"""Batches of structures of any tasks in arrays of a fixed size, with neighbour slots and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch_geometric.data import Data

from hydrazero.shards.graphs.neighbours import ROW_SLOTS, HalfPairs, half_pairs, lay_out
from hydrazero.shards.settings_parser import Section
from hydrazero.shards.structure import Structure, volumes
from hydrazero.shards.targets import KINDS, TargetColumn


class BatchShape(Section):
    """The fixed size of a batch; unused room is filled with padding, so that all batches cost the same."""

    structures: PositiveInt
    """Maximum number of structures in a batch."""
    atoms: PositiveInt
    """Maximum number of atoms in a batch."""
    slots: PositiveInt
    """Number of neighbour slots of a batch, each of which can hold one neighbour of one atom. They come in rows of 8,
    and an atom takes complete rows."""
    edges: NonNegativeInt = 0
    """Maximum number of neighbours in a batch, where each pair counts twice; it gives all ranks the same amount of
    work. At 0, only the slots limit it."""

    @property
    def most_edges(self) -> int:
        """Maximum number of edges, never 0."""
        return self.edges or self.slots

    @property
    def rows(self) -> int:
        """Number of rows of slots."""
        return self.slots // ROW_SLOTS


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphSample:
    """A structure with its neighbours, ready to be packed."""

    structure: Structure
    pairs: HalfPairs
    task: int
    rows: int
    """Number of rows of neighbour slots that it takes."""
    edges: int
    """Number of neighbours of all its atoms."""
    origin: tuple[int, ...] = ()
    """Place (task, block, row) of the structure in the stream."""


class GraphBatch(Data):
    """A batch of S structures with A atoms and R rows of K neighbour slots, all padded to a fixed size.

    numbers [A] int64 (0 where padded), positions [A, 3] Å around each structure's mean, row_atom [R] int64 (the atom
    whose neighbours a row holds), neighbours [R, K] int64 (an empty slot points at the row's own atom), shifts
    [R, K, 3] Å, reverse [R, K] int64 (flat index of the slot that holds the opposite pair; itself where empty),
    slot_mask [R, K], atom_mask [A], structure [A] int64 (index of the atom's structure), task [S] int64,
    structure_mask [S], n_atoms [S] int64, cell [S, 3, 3] Å, volume [S] Å³ (1 without one), periodic [S] (whether there
    is a volume, to which the stress refers), charge [S], multiplicity [S]; labels: energy [S] eV float64 with
    energy_mask [S], forces [A, 3] eV/Å with forces_mask [A], stress [S, 3, 3] eV/Å³ with stress_mask [S], and for each
    target of the stream target_NAME ([S], [S, 3], [A] or [A, 3]) with target_NAME_mask ([S] or [A]).
    """

    def source_ids(self) -> list[str]:
        """Return the source ids of the structures in the batch, without the padding."""
        return list(self.names)


def graph_sample(structure: Structure, task: int, cutoff: float, origin: tuple[int, ...] = ()) -> GraphSample:
    """Return a structure with its neighbours within `cutoff` (Å); raise StructureError as `half_pairs` does."""
    pairs = half_pairs(structure.positions, structure.cell, structure.pbc, cutoff)
    edges = 2 * len(pairs.first)
    return GraphSample(structure=structure, pairs=pairs, task=task, rows=pairs.rows, edges=edges, origin=origin)


def shape_holding(samples: Sequence[GraphSample]) -> BatchShape:
    """Return the smallest batch size that holds all samples."""
    return BatchShape(
        structures=max(len(samples), 1),
        atoms=max(sum(len(sample.structure) for sample in samples), 1),
        slots=max(sum(sample.rows for sample in samples), 1) * ROW_SLOTS,
    )


def collate(
    samples: Sequence[GraphSample], shape: BatchShape, dtype: torch.dtype, targets: Sequence[TargetColumn] = ()
) -> GraphBatch:
    """Return one batch of the given size with all samples, which must fit, and with the given targets.

    `dtype` is that of positions, shifts, cells, forces, stress and targets; energies are float64.
    """
    structures = [sample.structure for sample in samples]
    sizes = np.array([len(structure) for structure in structures], dtype=np.int64)
    # PyTorch fills and casts faster than NumPy, and its tensors need no further copy.
    tensors = {
        **_structure_columns(samples, structures, sizes, shape.structures, dtype),
        **_atom_columns(structures, sizes, shape, dtype),
        **_slot_columns(samples, shape, dtype),
    }
    for target in targets:
        tensors |= _target_columns(target, structures, shape, dtype)
    batch = GraphBatch(**tensors)
    batch.names = [structure.source_id for structure in structures]
    return batch


def _padded(values: Any, size: int, dtype: torch.dtype, tail: tuple[int, ...] = ()) -> Tensor:
    """Return values padded with zeros to [size, *tail]."""
    column = torch.zeros((size, *tail), dtype=dtype)
    if len(values):
        column[: len(values)] = torch.from_numpy(np.ascontiguousarray(values))
    return column


def _structure_columns(
    samples: Sequence[GraphSample],
    structures: Sequence[Structure],
    sizes: NDArray[np.int64],
    count: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    n = len(structures)
    cell = np.array([s.cell for s in structures]).reshape(n, 3, 3)
    volume = np.ones(count)
    found = volumes(cell, np.array([s.pbc for s in structures]).reshape(n, 3))
    has_volume = found > 0
    volume[:n][has_volume] = found[has_volume]
    energy = np.array([np.nan if s.energy is None else s.energy for s in structures], dtype=np.float64)
    stress, has_stress = np.zeros((n, 3, 3)), np.zeros(n, dtype=bool)
    for row, structure in enumerate(structures):
        if structure.stress is not None and has_volume[row]:
            stress[row], has_stress[row] = structure.stress, True
    whole, flag = torch.int64, torch.bool
    return {
        "task": _padded(np.array([sample.task for sample in samples], dtype=np.int64), count, whole),
        "structure_mask": torch.arange(count) < n,
        "n_atoms": _padded(sizes, count, whole),
        "cell": _padded(cell, count, dtype, (3, 3)),
        "volume": torch.from_numpy(volume).to(dtype),
        "periodic": _padded(has_volume, count, flag),
        "charge": _padded(np.array([s.charge for s in structures], dtype=np.int64), count, whole),
        "multiplicity": _padded(np.array([s.multiplicity for s in structures], dtype=np.int64), count, whole),
        "energy": _padded(np.nan_to_num(energy, nan=0.0), count, torch.float64),
        "energy_mask": _padded(~np.isnan(energy), count, flag),
        "stress": _padded(stress, count, dtype, (3, 3)),
        "stress_mask": _padded(has_stress, count, flag),
    }


def _atom_columns(
    structures: Sequence[Structure], sizes: NDArray[np.int64], shape: BatchShape, dtype: torch.dtype
) -> dict[str, Tensor]:
    count = shape.atoms
    owner = np.repeat(np.arange(len(structures)), sizes)
    n = len(owner)
    if n:
        numbers = np.concatenate([s.numbers for s in structures]).astype(np.int64)
        positions = np.concatenate([s.positions for s in structures])
        # Only differences of positions matter; around the mean, float32 keeps their digits.
        starts = np.cumsum(sizes) - sizes
        positions = positions - (np.add.reduceat(positions, starts) / sizes[:, None])[owner]
    else:
        numbers, positions = np.zeros(0, dtype=np.int64), np.zeros((0, 3))
    has_forces = np.repeat(np.array([s.forces is not None for s in structures], dtype=bool), sizes)
    labelled = [s.forces for s in structures if s.forces is not None]
    forces = torch.zeros((count, 3), dtype=dtype)
    if labelled:
        forces[:n][torch.from_numpy(has_forces)] = torch.from_numpy(np.concatenate(labelled)).to(dtype)
    # Padding belongs to the last structure, so that the atoms of each structure are adjacent.
    structure = torch.full((count,), shape.structures - 1, dtype=torch.int64)
    structure[:n] = torch.from_numpy(owner)
    return {
        "numbers": _padded(numbers, count, torch.int64),
        "positions": _padded(positions, count, dtype, (3,)),
        "atom_mask": torch.arange(count) < n,
        "structure": structure,
        "forces": forces,
        "forces_mask": _padded(has_forces, count, torch.bool),
    }


def _target_columns(
    target: TargetColumn, structures: Sequence[Structure], shape: BatchShape, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the padded column of a target, and a mask of where it is known."""
    of_atoms, tail = target.of == "atom", KINDS[target.kind]
    parts = []
    for structure in structures:
        held = structure.atom_targets if of_atoms else structure.targets
        rows = len(structure) if of_atoms else 1
        parts.append(held.get(target.name, np.full((rows, *tail), np.nan)).reshape(rows, *tail))
    values = np.concatenate(parts) if parts else np.zeros((0, *tail))
    known = ~np.isnan(values).any(axis=tuple(range(1, values.ndim)))
    values = np.where(known.reshape(-1, *[1] * len(tail)), values, 0.0)
    count = shape.atoms if of_atoms else shape.structures
    name = f"target_{target.name}"
    return {name: _padded(values, count, dtype, tail), f"{name}_mask": _padded(known, count, torch.bool)}


def _slot_columns(samples: Sequence[GraphSample], shape: BatchShape, dtype: torch.dtype) -> dict[str, Tensor]:
    layout = lay_out([sample.pairs for sample in samples])
    # Rows of padding belong to the last atom, which is padding too unless the batch is completely full.
    row_atom = torch.full((shape.rows,), shape.atoms - 1, dtype=torch.int64)
    row_atom[: len(layout.row_atom)] = torch.from_numpy(layout.row_atom)
    slot = torch.from_numpy(layout.slot)
    slots = shape.rows * ROW_SLOTS
    neighbours = row_atom.repeat_interleave(ROW_SLOTS)
    neighbours[slot] = torch.from_numpy(layout.sender)
    reverse = torch.arange(slots)
    reverse[slot] = torch.from_numpy(layout.reverse)
    mask = torch.zeros(slots, dtype=torch.bool)
    mask[slot] = True
    shifts = torch.zeros((slots, 3), dtype=dtype)
    shifts[slot] = torch.from_numpy(layout.shift).to(dtype)
    rows = (shape.rows, ROW_SLOTS)
    return {
        "row_atom": row_atom,
        "neighbours": neighbours.view(rows),
        "reverse": reverse.view(rows),
        "slot_mask": mask.view(rows),
        "shifts": shifts.view(*rows, 3),
    }
