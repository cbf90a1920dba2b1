"""Decoding of blocks of any origin: types, shapes, sums and values are checked, whole columns at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from hydrazero.shards.block import StructureBlock, block_from
from hydrazero.shards.errors import ShardError
from hydrazero.shards.structure import MAX_ATOMIC_NUMBER, MAX_MAGNITUDE, SMALLEST_VOLUME, cell_fault

COLUMNS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "n_atoms": ("int32", ("S",)),
    "numbers": ("uint8", ("A",)),
    "positions": ("float", ("A", 3)),
    "cell": ("float64", ("S", 3, 3)),
    "pbc": ("bool", ("S", 3)),
    "energy": ("float64", ("S",)),
    "charge": ("int16", ("S",)),
    "multiplicity": ("int16", ("S",)),
    "forces": ("float", ("A", 3)),
    "stress": ("float", ("S", 3, 3)),
}
"""Type and shape of each column of S structures with A atoms; 'float' is the precision of the positions."""
OPTIONAL = ("forces", "stress")


def decode_block(data: bytes, where: str) -> StructureBlock:
    """Return the block in `data`, of any origin; raise ShardError, naming `where`, if it is none, or damaged."""
    try:
        block = block_from(safetensors.numpy.load(data))
    except Exception as error:  # safetensors has errors of its own; missing columns raise TypeError
        raise ShardError(f"{where} is not a readable block of structures ({error}); convert the task again.") from error
    if fault := fault_of(block):
        raise ShardError(f"{where} is damaged ({fault}); convert the task again.")
    return block


def fault_of(block: StructureBlock) -> str:
    """Return what is wrong with a block, as a part of a sentence, or "" if nothing is."""
    # Later checks rely on the shapes that earlier ones have found to be right.
    return _layout_fault(block) or _value_fault(block) or _cells_fault(block) or _label_fault(block)


def _layout_fault(block: StructureBlock) -> str:
    if block.positions.dtype not in (np.float32, np.float64):
        return f"its positions are of type {block.positions.dtype}"
    sizes = {
        "S": len(block.n_atoms) if block.n_atoms.ndim else -1,
        "A": len(block.numbers) if block.numbers.ndim else -1,
    }
    for name, (kind, shape) in COLUMNS.items():
        column = getattr(block, name)
        if column is None and name in OPTIONAL:
            continue
        wanted = block.positions.dtype if kind == "float" else np.dtype(kind)
        if fault := _column_fault(name, column, wanted, tuple(sizes.get(str(length), length) for length in shape)):
            return fault
    for owner, columns in ((sizes["S"], block.targets), (sizes["A"], block.atom_targets)):
        for name, column in columns.items():
            tail = column.shape[1:] if column.shape[1:] == (3,) else ()
            if fault := _column_fault(name, column, np.dtype("float64"), (owner, *tail)):
                return fault
    if not sizes["S"] or block.n_atoms.min() < 1 or block.n_atoms.sum(dtype=np.int64) != sizes["A"]:
        return f"the sizes of its {sizes['S']} structures do not add up to {sizes['A']:,} atoms"
    return _names_fault(block)


def _column_fault(name: str, column: NDArray[Any], kind: np.dtype[Any], shape: tuple[Any, ...]) -> str:
    if column.dtype != kind or column.shape != shape:
        return f"'{name}' is of type {column.dtype} and shape {column.shape}, not {kind} and {shape}"
    return ""


def _names_fault(block: StructureBlock) -> str:
    if block.source_ids is None:
        return ""
    if block.source_ids.dtype != np.uint8 or block.source_ids.ndim != 1:
        return f"'source_ids' is of type {block.source_ids.dtype} and shape {block.source_ids.shape}"
    try:
        names = len(block.names)
    except UnicodeDecodeError:
        return "its source ids are not UTF-8"
    return "" if names == len(block) else f"it holds {names} source ids of {len(block)} structures"


def _value_fault(block: StructureBlock) -> str:
    if block.numbers.min() < 1 or block.numbers.max() > MAX_ATOMIC_NUMBER:
        return "an atomic number is not that of an element"
    # NaN is not below the limit either.
    if not np.abs(block.positions).max() <= MAX_MAGNITUDE:
        return f"a position is NaN, infinite or above {MAX_MAGNITUDE:.0e} Å"
    if not np.abs(block.cell).max() <= MAX_MAGNITUDE:
        return f"a cell is NaN, infinite or above {MAX_MAGNITUDE:.0e} Å"
    if block.pbc.view(np.uint8).max() > 1:
        return "'pbc' holds other values than true and false"
    return "" if block.multiplicity.min() >= 0 else "a multiplicity is negative"


def _cells_fault(block: StructureBlock) -> str:
    periodic = np.flatnonzero(block.pbc.any(axis=1))
    if not len(periodic):
        return ""
    pbc = block.pbc[periodic]
    # Along open directions, unit vectors at right angles stand in; the rest is then a length or an area.
    gram = np.where(pbc[:, :, None], block.cell[periodic], 0.0)
    gram = gram @ gram.transpose(0, 2, 1) + np.where(pbc, 0.0, 1.0)[:, :, None] * np.eye(3)
    lengths = np.sqrt(gram[:, range(3), range(3)])
    volume = np.sqrt(np.maximum(np.linalg.det(gram), 0.0))
    small = volume < SMALLEST_VOLUME * block.n_atoms[periodic]
    with np.errstate(divide="ignore", invalid="ignore"):
        doubtful = small | ~(volume / lengths.prod(axis=1) >= 1e-3)
    for index in periodic[doubtful].tolist():
        positions = block.positions[block.starts[index] : block.starts[index + 1]].astype(np.float64)
        if (fault := cell_fault(block.cell[index], block.pbc[index], positions)) is not None:
            return f"structure {index}: {fault}"
    return ""


def _label_fault(block: StructureBlock) -> str:
    if _infinite(block.energy, np.finfo(np.float64).max):
        return "an energy is infinite"
    for name, column in {"forces": block.forces, "stress": block.stress}.items():
        if column is None or np.abs(column).max() <= MAX_MAGNITUDE:
            continue
        if _infinite(column, MAX_MAGNITUDE):
            return f"a number of its {name} is infinite or above {MAX_MAGNITUDE:.0e}"
        lost = np.isnan(column).reshape(len(column), -1)
        by_structure = np.add.reduceat(lost, block.starts[:-1]) if name == "forces" else lost.sum(axis=1)[:, None]
        whole = block.n_atoms[:, None] if name == "forces" else lost.shape[1]
        if not ((by_structure == 0) | (by_structure == whole)).all() or (lost.any(axis=1) != lost.all(axis=1)).any():
            return f"{name} of a structure are NaN in part"
    for name, column in {**block.targets, **block.atom_targets}.items():
        if _infinite(column, MAX_MAGNITUDE):
            return f"a value of '{name}' is infinite or above {MAX_MAGNITUDE:.0e}"
    return ""


def _infinite(column: NDArray[np.floating], most: float) -> bool:
    """Return whether a number is above `most`; NaN is not."""
    return bool((np.abs(column) > most).any())
