"""Neighbour lists: found for each structure as half lists, and laid out for each batch in rows of slots.

A row belongs to one atom and has slots for ROW_SLOTS of its neighbours; an atom takes as many rows as it needs. Dense
crystals and sparse molecules can therefore share a batch of fixed size with little padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import local

import numpy as np
from ase.geometry import complete_cell
from numpy.typing import NDArray
from vesin import NeighborList

from hydrazero.shards.errors import StructureError
from hydrazero.shards.structure import volume_per_atom

ROW_SLOTS = 8
"""Number of slots in a row. Shorter rows have less padding, but there are more of them to sum over (sixteen datasets at
5 Å: 88% of the slots are used with rows of 8, 94% with rows of 4, 82% with one row per atom and eight batch sizes)."""


NO_VECTORS = np.zeros((0, 3))
MOST_NEIGHBOURS = 20_000
"""Maximum number of neighbours of an atom, which no cutoff up to 20 Å reaches in any matter."""
ENGINES_KEPT = 8
"""Maximum number of cutoffs whose engine a thread keeps."""
MOST_CUTOFFS = 20_000
"""Maximum extent of a structure in cutoffs; vesin ends the process at about 100,000."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HalfPairs:
    """Neighbour list of a structure of A atoms, in which each of P pairs occurs once."""

    first: NDArray[np.int64]
    """Index of the first atom of each pair, [P]."""
    second: NDArray[np.int64]
    """Index of the second atom of each pair, [P]."""
    shift: NDArray[np.float64] | None
    """Periodic shifts in Å, [P, 3]; None stands for zeros. The vector of a pair is positions[second] + shift -
    positions[first]."""
    degrees: NDArray[np.int64]
    """Number of neighbours of each atom, [A]."""

    @property
    def rows(self) -> int:
        """Number of rows of slots that the structure takes."""
        return int((-(-self.degrees // ROW_SLOTS)).sum())

    def lengths(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the distances of the pairs at positions [A, 3] Å: [P] Å."""
        between = positions.take(self.second, axis=0)  # three times as fast as an index
        between -= positions.take(self.first, axis=0)
        if self.shift is not None:
            between += self.shift
        distances: NDArray[np.float64] = np.sqrt(np.einsum("pc,pc->p", between, between))
        return distances


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotLayout:
    """Slots of the E directed pairs of a batch; each pair is present as i<-j and as j<-i."""

    receiver: NDArray[np.int64]
    """Index of the receiving atom i, [E]."""
    sender: NDArray[np.int64]
    """Index of the sending atom j, [E]."""
    shift: NDArray[np.float64]
    """Periodic shifts in Å, [E, 3]: the vector of a pair is positions[sender] + shift - positions[receiver]."""
    slot: NDArray[np.int64]
    """Flat index of the slot of the pair, row * ROW_SLOTS + position in the row, [E]."""
    reverse: NDArray[np.int64]
    """Flat index of the slot of the opposite pair, [E]."""
    row_atom: NDArray[np.int64]
    """Index of the atom of each row, [rows]."""


class _Engines(local):
    """The engines of one thread: an engine keeps its pairs in memory of its own, so threads must not share one."""

    def __init__(self) -> None:
        self.kept: dict[float, NeighborList] = {}

    def of(self, cutoff: float) -> NeighborList:
        """Return an engine for a cutoff in Å, the same one each time for the cutoffs that were used first."""
        if cutoff in self.kept:
            return self.kept[cutoff]
        # A half list: the other half is its mirror, so that opposite pairs need no search. One thread, because there
        # are many reading processes already.
        engine = NeighborList(cutoff=cutoff, full_list=False, n_threads=1)
        if len(self.kept) < ENGINES_KEPT:
            self.kept[cutoff] = engine
        return engine


_engines = _Engines()


def half_pairs(
    positions: NDArray[np.floating], cell: NDArray[np.floating], pbc: NDArray[np.bool_], cutoff: float
) -> HalfPairs:
    """Return all pairs within `cutoff` (Å), found by vesin.

    `positions` [atoms, 3] and `cell` [3, 3] are in Å, `pbc` has shape [3]. Raises StructureError if vesin cannot build
    a list, or if the structure extends too far.
    """
    periodic = pbc.tolist()
    points = np.ascontiguousarray(positions, dtype=np.float64)
    box = np.asarray(cell, dtype=np.float64)
    anywhere = any(periodic)
    _check_extent(points, box[pbc] if anywhere else NO_VECTORS, cutoff)
    if anywhere and not all(periodic):
        # vesin needs three independent vectors; those along open directions are never used as shifts.
        box = complete_cell(np.where(np.array(periodic)[:, None], box, 0.0))
    if anywhere:
        _check_density(points, box, pbc, cutoff)
    try:
        found = _engines.of(cutoff).compute(
            points=points, box=box, periodic=periodic if anywhere else False, quantities="ijS" if anywhere else "ij"
        )
    except RuntimeError as error:
        raise StructureError("neighbour_list", f"no neighbour list can be built ({error})") from error
    first, second = found[0].view(np.int64), found[1].view(np.int64)
    degrees = np.bincount(np.concatenate([first, second]), minlength=len(points))
    return HalfPairs(first=first, second=second, shift=found[2] @ box if anywhere else None, degrees=degrees)


def _check_extent(points: NDArray[np.float64], vectors: NDArray[np.float64], cutoff: float) -> None:
    """Raise StructureError if a structure extends so far that the number of vesin's boxes overflows."""
    if not len(points):
        return
    longest = np.abs(vectors).max() if len(vectors) else 0.0
    if points.max() - points.min() + longest <= MOST_CUTOFFS * cutoff:  # fast check, which usually suffices
        return
    extent = max(np.ptp(points, axis=0).max(), longest)
    if not np.isfinite(extent + np.abs(vectors).sum()):
        raise StructureError("non_finite_positions", "a position or a cell vector is NaN or infinite")
    if extent > MOST_CUTOFFS * cutoff:
        raise StructureError(
            "far_apart",
            f"the structure extends over {extent:,.0f} Å, over {MOST_CUTOFFS:,} times the cutoff of {cutoff:g} Å",
        )


def _check_density(
    points: NDArray[np.float64], box: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> None:
    """Raise StructureError if atoms have more neighbours than memory and time suffice for, by their density."""
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = box.tolist()
    volume = abs(ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx))
    sphere = 4.0 / 3.0 * np.pi * cutoff**3
    if sphere * len(points) <= MOST_NEIGHBOURS * volume:  # open directions, 1 Å thick here, only have more room
        return
    neighbours = sphere / max(volume_per_atom(box[pbc], points, 1.4 * cutoff), 1e-300)
    if not neighbours <= MOST_NEIGHBOURS:
        raise StructureError(
            "too_dense",
            f"an atom has about {neighbours:.1g} neighbours within the cutoff of {cutoff:g} Å, more than "
            f"{MOST_NEIGHBOURS:,}; the cell is too small, perhaps in another unit",
        )


def lay_out(structures: Sequence[HalfPairs]) -> SlotLayout:
    """Return the slots of the pairs of consecutive structures in a batch; the rows of each atom are adjacent."""
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
    # Radix sort needs small keys; batches of 65,536 or more atoms use the ordinary sort.
    order = np.argsort(receiver.astype(np.uint16) if len(degrees) <= 0xFFFF else receiver, kind="stable")
    rows = -(-degrees // ROW_SLOTS)
    # In order of receivers, pair e goes to slot e plus the number of empty slots in the last rows of earlier atoms.
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
