"""Neighbour lists in slots: every pair within the cutoff in both directions, with the slot of its reverse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from ase.geometry import complete_cell
from numpy.typing import NDArray
from vesin import NeighborList

from hydrazero.shards.errors import StructureError


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """Directed pairs sorted by receiver; E pairs, each present as i<-j and j<-i."""

    receiver: NDArray[np.int64]
    """Atom i of each pair, ascending, [E]."""
    sender: NDArray[np.int64]
    """Atom j, [E]."""
    shift: NDArray[np.float64]
    """Å, [E, 3]; the pair's vector is positions[sender] + shift - positions[receiver]."""
    slot: NDArray[np.int64]
    """Place of the pair among its receiver's pairs, [E]."""
    reverse: NDArray[np.int64]
    """Index of the opposite pair, [E]."""

    @property
    def max_degree(self) -> int:
        """Neighbours of the atom that has most."""
        return int(self.slot.max()) + 1 if len(self.slot) else 0


@lru_cache(maxsize=8)
def _engine(cutoff: float) -> NeighborList:
    # A half list: the other half is its mirror, so the reverse of each pair comes without a search.
    return NeighborList(cutoff=cutoff, full_list=False)


def neighbour_slots(
    positions: NDArray[np.floating], cell: NDArray[np.floating], pbc: NDArray[np.bool_], cutoff: float
) -> Neighbours:
    """Find all pairs within `cutoff` (Å) with vesin.

    `positions` Å [atoms, 3], `cell` Å [3, 3], `pbc` [3]. Raises StructureError if the cell cannot carry a list.
    """
    box = np.asarray(cell, dtype=np.float64)
    periodic = [bool(p) for p in pbc]
    if any(periodic) and not all(periodic):
        # vesin wants three independent vectors; those along open directions are never used as shifts.
        box = complete_cell(np.where(np.array(periodic)[:, None], box, 0.0))
    points = np.ascontiguousarray(positions, dtype=np.float64)
    try:
        first, second, cell_shift = _engine(cutoff).compute(
            points=points, box=box, periodic=periodic if any(periodic) else False, quantities="ijS"
        )
    except RuntimeError as error:
        raise StructureError("neighbour_list", f"no neighbour list can be built ({error})") from error
    half = len(first)
    receiver = np.concatenate([first, second]).astype(np.int64)
    sender = np.concatenate([second, first]).astype(np.int64)
    shift = cell_shift @ box if any(periodic) else np.zeros((half, 3))
    shift = np.concatenate([shift, -shift])
    # Radix sort needs small keys; structures of 65,536 atoms and more take the ordinary sort.
    key = receiver.astype(np.uint16) if len(points) <= 0xFFFF else receiver
    order = np.argsort(key, kind="stable")
    place = np.empty(2 * half, dtype=np.int64)
    place[order] = np.arange(2 * half)
    receiver = receiver[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(receiver, minlength=len(points)))[:-1]])
    return Neighbours(
        receiver=receiver,
        sender=sender[order],
        shift=shift[order],
        slot=np.arange(2 * half) - starts[receiver],
        reverse=place[(order + half) % (2 * half)] if half else order,
    )
