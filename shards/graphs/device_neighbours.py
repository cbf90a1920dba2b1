"""Neighbour lists of complete batches, found and laid out in slots on the device of the batch (extra `gpu`)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.errors import ConfigError, StructureError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.graphs.neighbours import ROW_SLOTS

FAR = 1e3
"""Side length in Å of the cell of a structure that has none."""


def has_device_neighbours() -> bool:
    """Return whether nvalchemi-toolkit-ops is installed."""
    return importlib.util.find_spec("nvalchemiops") is not None


def neighbour_engine() -> Any:
    """Return nvalchemi-toolkit-ops' function for batched neighbour lists; raise ConfigError if it is not installed."""
    try:
        return importlib.import_module("nvalchemiops.torch.neighbors").neighbor_list
    except ImportError as error:
        raise ConfigError(
            f"neighbour lists on the device need nvalchemi-toolkit-ops ({error}): pip install 'hydrazero[gpu]'."
        ) from error


def find_neighbours(batch: GraphBatch, rows: int, cutoff: float) -> bool:
    """Add the neighbour slots within `cutoff` (Å) to a batch on its device; return whether `rows` rows were enough.

    There are `rows` rows of slots, or more if the pairs need them. The atoms of each structure must be adjacent, and
    padding last; `batch.pbc` [S, 3] says along which lattice vectors structures are periodic.
    """
    count = int(batch.atom_mask.sum())
    pairs, shifts = _pairs(batch, count, cutoff)
    receiver, sender = pairs[0].to(torch.int64), pairs[1].to(torch.int64)
    order = torch.argsort(receiver, stable=True)
    receiver, sender, shifts = receiver[order], sender[order], shifts[order].to(torch.int64)
    degrees = torch.bincount(receiver, minlength=count)
    taken = -(-degrees // ROW_SLOTS)
    total = int(taken.sum())
    # As in `collate`: rows of padding belong to the last atom, an empty slot points at the row's own atom.
    row_atom = torch.full((max(rows, total),), len(batch.numbers) - 1, device=receiver.device)
    row_atom[:total] = torch.repeat_interleave(torch.arange(count, device=receiver.device), taken)
    first_pair, first_row = degrees.cumsum(0) - degrees, taken.cumsum(0) - taken
    place = torch.arange(len(receiver), device=receiver.device) - first_pair[receiver]
    slot = first_row[receiver] * ROW_SLOTS + place
    _lay_out(batch, row_atom, slot, _Pairs(receiver=receiver, sender=sender, shifts=shifts))
    return total <= rows


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """E directed pairs, sorted by receiver."""

    receiver: Tensor
    """Index of the receiving atom, [E]."""
    sender: Tensor
    """Index of the sending atom, [E]."""
    shifts: Tensor
    """Number of cells by which the sender is shifted along each lattice vector, [E, 3] int64."""


def _pairs(batch: GraphBatch, count: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """Return all directed pairs [2, E] of the first `count` atoms, and the numbers of cells between them [E, 3]."""
    periodic = batch.pbc.any(1)
    box = torch.eye(3, dtype=batch.cell.dtype, device=batch.cell.device) * FAR
    cells = torch.where(periodic.view(-1, 1, 1), batch.cell, box)
    ends = batch.n_atoms.cumsum(0).to(torch.int32)
    given = {
        "cell": cells.contiguous(),
        "pbc": batch.pbc,
        "batch_idx": batch.structure[:count].to(torch.int32),
        "batch_ptr": torch.cat([ends.new_zeros(1), ends]),
        "return_neighbor_list": True,
    }
    positions, engine = batch.positions[:count].contiguous(), neighbour_engine()
    try:
        found = engine(positions, cutoff, **given)
    except Exception as error:  # its class is not exported
        if type(error).__name__ != "NeighborOverflowError":
            raise
        found = _with_more_room(partial(engine, positions, cutoff, **given))
    return found[0], found[2]


def _with_more_room(search: Callable[..., Any]) -> Any:
    """Search again with room for more neighbours: the engine itself assumes a density of 0.2 atoms/Å³."""
    for most in (256, 512, 1024, 2048, 4096):
        try:
            return search(max_neighbors=most, method="batch_cell_list")
        except Exception as error:
            if type(error).__name__ != "NeighborOverflowError":
                raise
    raise StructureError("too_dense", "an atom has more than 4,096 neighbours within the cutoff")


def _lay_out(batch: GraphBatch, row_atom: Tensor, slot: Tensor, pairs: _Pairs) -> None:
    """Write pairs into the slots of the batch."""
    rows, slots = (len(row_atom), ROW_SLOTS), len(row_atom) * ROW_SLOTS
    neighbours = row_atom.repeat_interleave(ROW_SLOTS)
    neighbours[slot] = pairs.sender
    mask = torch.zeros(slots, dtype=torch.bool, device=slot.device)
    mask[slot] = True
    # The opposite of (i, j, cells) is (j, i, -cells): sorted by such keys, pairs and opposites have the same order.
    here = _keys(pairs.receiver, pairs.sender, pairs.shifts)
    there = _keys(pairs.sender, pairs.receiver, -pairs.shifts)
    reverse = torch.arange(slots, device=slot.device)
    reverse[slot[torch.argsort(there)]] = slot[torch.argsort(here)]
    cells = batch.cell[batch.structure[pairs.receiver]]
    vectors = cells.new_zeros(slots, 3)
    vectors[slot] = torch.einsum("es,esc->ec", pairs.shifts.to(cells.dtype), cells)
    batch.row_atom, batch.neighbours, batch.reverse = row_atom, neighbours.view(rows), reverse.view(rows)
    batch.slot_mask, batch.shifts = mask.view(rows), vectors.view(*rows, 3)


def _keys(first: Tensor, second: Tensor, shifts: Tensor) -> Tensor:
    """Return a number for each pair that no other pair has, [E]."""
    most = int(shifts.abs().max()) if len(shifts) else 0
    base, atoms = 2 * most + 1, int(torch.maximum(first, second).max()) + 1 if len(first) else 1
    x, y, z = (shifts + most).unbind(1)
    return (((first * atoms + second) * base + x) * base + y) * base + z
