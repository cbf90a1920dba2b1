"""Gathers over neighbour slots whose derivatives are gathers as well, to any order.

Row r holds neighbours of the atom row_atom[r]; slot (r, k) holds the pair from neighbour m = neighbours[r, k] to that
atom, and reverse[r, k] is the slot of the opposite pair. Summing slots by their neighbour is therefore a gather through
`reverse`, a sum over k and a sum over each atom's rows. An empty slot refers to its row's own atom and to itself; the
caller must mask its values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hydrazero.shards.graphs.graph import GraphBatch


@dataclass(frozen=True, kw_only=True)
class Segments:
    """N items sorted by owner: rows of slots, owned by atoms, or atoms, owned by structures."""

    owner: Tensor
    """Index of the owner of each item, [N] int64, ascending."""
    count: int
    """Number of owners."""
    kernels: bool = False
    """Whether sums use the C++ kernels (`hydrazero.models.ops.kernels`, which must be loaded) or plain PyTorch."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums [count, ...] of values of items [N, ...] over the items of each owner."""
        return _Sum.apply(values, self)

    def spread(self, x: Tensor) -> Tensor:
        """Return for each item the row of its owner in x [count, ...]: [N, ...]."""
        return _Spread.apply(x, self)


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The pairs in the slots of a batch: A atoms, R rows of K slots."""

    atoms: int
    row_atom: Tensor
    """Atom of each row, [R] int64."""
    neighbours: Tensor
    """Neighbour in each slot, [R, K] int64."""
    reverse: Tensor
    """Flat index of the slot of the opposite pair, [R, K] int64."""
    mask: Tensor
    """False where a slot is empty, [R, K] bool."""
    kernels: bool = False
    """Whether sums use the C++ kernels (`hydrazero.models.ops.kernels`, which must be loaded) or plain PyTorch."""

    @property
    def rows(self) -> Segments:
        """The rows as items that atoms own."""
        return Segments(owner=self.row_atom, count=self.atoms, kernels=self.kernels)

    def gather(self, x: Tensor) -> Tensor:
        """Return for each slot the row of its neighbour in x [A, ...]: [R, K, ...]."""
        return _Gather.apply(x, self)

    def opposite(self, values: Tensor) -> Tensor:
        """Return for each slot the value of the opposite pair: [R, K, ...] -> [R, K, ...]."""
        return _Opposite.apply(values, self)

    def spread(self, x: Tensor) -> Tensor:
        """Return for each row of slots the row of its atom in x [A, ...]: [R, ...]."""
        return self.rows.spread(x)

    def sum_rows(self, values: Tensor) -> Tensor:
        """Return the sums [A, ...] of values of rows [R, ...] over the rows of each atom."""
        return self.rows.sum(values)

    def pair_vectors(self, positions: Tensor, shifts: Tensor) -> Tensor:
        """Return the vectors in Å from each row's atom to its neighbours, [R, K, 3]; zero in empty slots."""
        return self.gather(positions) - _Own.apply(positions, self) + shifts


def slots_of(batch: GraphBatch, *, kernels: bool = False) -> Slots:
    """Return the slots of a batch."""
    return Slots(
        atoms=batch.numbers.shape[0],
        row_atom=batch.row_atom,
        neighbours=batch.neighbours,
        reverse=batch.reverse,
        mask=batch.slot_mask,
        kernels=kernels,
    )


def _flat(values: Tensor, leading: int) -> Tensor:
    """Return x as a matrix [N, C]; N may be 0, for which -1 is not allowed in a shape."""
    return values.reshape(math.prod(values.shape[:leading]), math.prod(values.shape[leading:]))


def _segment_sum(segments: Segments, values: Tensor, slots: Tensor | None = None) -> Tensor:
    """Sum over the items of each owner: items [N, C], their K slots [N * K, C], or slots that they refer to [N, K].

    The precision is at least float32.
    """
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.to(torch.float32)
    if segments.kernels:
        out: Tensor = torch.ops.hydrazero.segment_sum(segments.owner, values, slots, segments.count)
        return out
    if slots is not None:
        values = values.index_select(0, slots.reshape(-1))
    # Sizes from shapes instead of len() stay variable in a graph of variable sizes.
    items = segments.owner.shape[0]
    if values.shape[0] != items:
        values = values.view(items, -1, values.shape[1]).sum(1)
    if values.is_cuda:
        return sum_in_order(segments, values)
    return values.new_zeros(segments.count, values.shape[1]).index_add(0, segments.owner, values)


def sum_in_order(segments: Segments, values: Tensor) -> Tensor:
    """Return the sums [count, C] of items [N, C] of each owner, added in a fixed order.

    On a GPU `index_add` adds in an arbitrary order, so results differ between runs; on a CPU it is four times as fast
    as this.
    """
    bounds = torch.arange(segments.count + 1, device=values.device)
    starts = torch.searchsorted(segments.owner, bounds)
    return torch.segment_reduce(values, "sum", offsets=starts, axis=0, unsafe=True, initial=0.0)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        flat = _flat(x, 1).index_select(0, slots.neighbours.reshape(-1))
        return flat.view(*slots.neighbours.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _SumBySender.apply(grads[0], ctx.slots), None


class _SumBySender(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        flat = _flat(values, 2)
        return _segment_sum(slots.rows, flat, slots.reverse).view(slots.atoms, *values.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(grads[0], ctx.slots), None


class _Opposite(Function):
    """Exchange of opposite pairs; applied twice it is the identity, so it is its own derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        flat = _flat(values, 2).index_select(0, slots.reverse.reshape(-1))
        return flat.view(values.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Opposite.apply(grads[0], ctx.slots), None


class _Own(Function):
    """Return for each slot the row of its own atom in x [A, ...]: [R, K, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        r, k = slots.neighbours.shape
        return x.index_select(0, slots.row_atom).unsqueeze(1).expand(r, k, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _SumOwn.apply(grads[0], ctx.slots), None


class _SumOwn(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        flat = _flat(values, 2)
        return _segment_sum(slots.rows, flat).view(slots.atoms, *values.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Own.apply(grads[0], ctx.slots), None


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return x.index_select(0, segments.owner)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(grads[0], ctx.segments), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        flat = _flat(values, 1)
        return _segment_sum(segments, flat).view(segments.count, *values.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(grads[0], ctx.segments), None
