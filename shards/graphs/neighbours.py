"""Neighbours within the cutoff: found per structure as a half list, laid out per batch in rows of slots.

A row belongs to one atom and holds ROW_SLOTS of its neighbours; an atom takes as many rows as it needs. Dense crystals
and sparse molecules therefore share a batch of one fixed size with little padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from ase.geometry import complete_cell
from numpy.typing import NDArray
from vesin import NeighborList

from hydrazero.shards.errors import StructureError

ROW_SLOTS = 8
"""Neighbours in a row. Fewer leave less padding (measured on sixteen datasets at 5 Å: 88% of the slots of eights are
filled, 94% of fours, 82% of one row an atom with eight sizes of batches) and more rows to sum up."""


NO_VECTORS = np.zeros((0, 3))
MOST_CUTOFFS = 20_000
"""That a structure may extend over; vesin stops the process where it is some 100,000."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HalfPairs:
    """Each pair of a structure once; P pairs, A atoms."""

    first: NDArray[np.int64]
    """[P]."""
    second: NDArray[np.int64]
    """[P]."""
    shift: NDArray[np.float64] | None
    """Å, [P, 3]; the vector from first to second is positions[second] + shift - positions[first]. None: no shifts."""
    degrees: NDArray[np.int64]
    """Neighbours of each atom, [A]."""

    @property
    def rows(self) -> int:
        """Rows of slots that the structure takes."""
        return int((-(-self.degrees // ROW_SLOTS)).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotLayout:
    """Directed pairs of a batch and where each is laid; E pairs, each present as i<-j and j<-i."""

    receiver: NDArray[np.int64]
    """Atom i, [E]."""
    sender: NDArray[np.int64]
    """Atom j, [E]."""
    shift: NDArray[np.float64]
    """Å, [E, 3]; the pair's vector is positions[sender] + shift - positions[receiver]."""
    slot: NDArray[np.int64]
    """Flat slot of the pair, row * ROW_SLOTS + place in the row, [E]."""
    reverse: NDArray[np.int64]
    """Flat slot of the opposite pair, [E]."""
    row_atom: NDArray[np.int64]
    """Atom of each row, [rows]."""


@lru_cache(maxsize=8)
def _engine(cutoff: float) -> NeighborList:
    # A half list: the other half is its mirror, so the reverse of each pair comes without a search. One thread: the
    # readers are many processes already.
    return NeighborList(cutoff=cutoff, full_list=False, n_threads=1)


def half_pairs(
    positions: NDArray[np.floating], cell: NDArray[np.floating], pbc: NDArray[np.bool_], cutoff: float
) -> HalfPairs:
    """Find all pairs within `cutoff` (Å) with vesin.

    `positions` Å [atoms, 3], `cell` Å [3, 3], `pbc` [3]. Raises StructureError if the cell cannot carry a list.
    """
    periodic = pbc.tolist()
    points = np.ascontiguousarray(positions, dtype=np.float64)
    box = np.asarray(cell, dtype=np.float64)
    anywhere = any(periodic)
    _check_extent(points, box[pbc] if anywhere else NO_VECTORS, cutoff)
    if anywhere and not all(periodic):
        # vesin wants three independent vectors; those along open directions are never used as shifts.
        box = complete_cell(np.where(np.array(periodic)[:, None], box, 0.0))
    try:
        found = _engine(cutoff).compute(
            points=points, box=box, periodic=periodic if anywhere else False, quantities="ijS" if anywhere else "ij"
        )
    except RuntimeError as error:
        raise StructureError("neighbour_list", f"no neighbour list can be built ({error})") from error
    first, second = found[0].view(np.int64), found[1].view(np.int64)
    degrees = np.bincount(np.concatenate([first, second]), minlength=len(points))
    return HalfPairs(first=first, second=second, shift=found[2] @ box if anywhere else None, degrees=degrees)


def _check_extent(points: NDArray[np.float64], vectors: NDArray[np.float64], cutoff: float) -> None:
    """Raise StructureError for what is too far spread for vesin, whose numbers of boxes overflow."""
    if not len(points):
        return
    longest = np.abs(vectors).max() if len(vectors) else 0.0
    if max(points.max() - points.min(), longest) <= MOST_CUTOFFS * cutoff:  # quick to see, and usual
        return
    extent = max(np.ptp(points, axis=0).max(), longest)
    if extent > MOST_CUTOFFS * cutoff:
        raise StructureError(
            "far_apart", f"it extends over {extent:,.0f} Å, more than {MOST_CUTOFFS:,} times the cutoff of {cutoff:g} Å"
        )


def lay_out(structures: Sequence[HalfPairs]) -> SlotLayout:
    """Lay the pairs of structures that follow each other in a batch into rows, each atom's rows one after another."""
    degrees = np.concatenate([pairs.degrees for pairs in structures]) if structures else np.zeros(0, dtype=np.int64)
    counts = np.array([len(pairs.first) for pairs in structures], dtype=np.int64)
    atoms = np.array([len(pairs.degrees) for pairs in structures], dtype=np.int64)
    half = int(counts.sum())
    receiver = np.empty(2 * half, dtype=np.int64)
    shift = np.zeros((2 * half, 3))
    begin = start = 0
    for pairs, count, size in zip(structures, counts.tolist(), atoms.tolist(), strict=True):
        end = begin + count
        np.add(pairs.first, start, out=receiver[begin:end])
        np.add(pairs.second, start, out=receiver[half + begin : half + end])
        if pairs.shift is not None:
            shift[begin:end] = pairs.shift
        begin, start = end, start + size
    np.negative(shift[:half], out=shift[half:])
    sender = np.concatenate([receiver[half:], receiver[:half]])
    # Radix sort needs small keys; batches of 65,536 atoms and more take the ordinary sort.
    order = np.argsort(receiver.astype(np.uint16) if len(degrees) <= 0xFFFF else receiver, kind="stable")
    rows = -(-degrees // ROW_SLOTS)
    # In order of receivers, pair number e goes to slot e plus what earlier atoms have left empty in their last rows.
    gap = np.cumsum(rows * ROW_SLOTS - degrees) - (rows * ROW_SLOTS - degrees)
    slot = np.empty(2 * half, dtype=np.int64)
    slot[order] = np.arange(2 * half) + np.repeat(gap, degrees)
    return SlotLayout(
        receiver=receiver,
        sender=sender,
        shift=shift,
        slot=slot,
        reverse=np.concatenate([slot[half:], slot[:half]]),
        row_atom=np.repeat(np.arange(len(degrees)), rows),
    )
