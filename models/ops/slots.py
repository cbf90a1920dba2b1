"""Gathers over neighbour slots whose derivatives are gathers too, closed under differentiation of any order.

Row r holds neighbours of the atom row_atom[r]; slot (r, k) holds the pair from neighbour m = neighbours[r, k] to that
atom, and reverse[r, k] is the slot of the opposite pair. Summing slots by their neighbour is therefore a gather through
`reverse`, a sum over k and a sum over each atom's rows. An empty slot points at its row's own atom and at itself; what
flows through it must be masked by the caller.
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
    """N items in the order of what owns them: rows of slots of atoms, or atoms of structures."""

    owner: Tensor
    """[N] int64, ascending."""
    count: int
    """Owners."""
    kernels: bool = False
    """Whether sums are those of `hydrazero.models.ops.kernels`, which must be loaded, or plain PyTorch's."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum what items hold over those of each owner: [N, ...] -> [count, ...]."""
        return _Sum.apply(values, self)

    def spread(self, x: Tensor) -> Tensor:
        """Return each item's owner's row of x: [count, ...] -> [N, ...]."""
        return _Spread.apply(x, self)


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Which pairs the slots hold: A atoms, R rows of K slots."""

    atoms: int
    row_atom: Tensor
    """[R] int64."""
    neighbours: Tensor
    """[R, K] int64."""
    reverse: Tensor
    """Flat slot of the opposite pair, [R, K] int64."""
    mask: Tensor
    """False where a slot is empty, [R, K]."""
    kernels: bool = False
    """Whether sums over slots are those of `hydrazero.models.ops.kernels`, which must be loaded, or plain PyTorch's."""

    @property
    def rows(self) -> Segments:
        """Rows as the parts of their atoms."""
        return Segments(owner=self.row_atom, count=self.atoms, kernels=self.kernels)

    def gather(self, x: Tensor) -> Tensor:
        """Return each slot's neighbour's row of x: [A, ...] -> [R, K, ...]."""
        return _Gather.apply(x, self)

    def opposite(self, values: Tensor) -> Tensor:
        """Return what each slot's opposite pair holds: [R, K, ...] -> [R, K, ...]."""
        return _Opposite.apply(values, self)

    def spread(self, x: Tensor) -> Tensor:
        """Return each row's own atom's row of x: [A, ...] -> [R, ...]."""
        return self.rows.spread(x)

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum what rows hold over the rows of each atom: [R, ...] -> [A, ...]."""
        return self.rows.sum(values)

    def pair_vectors(self, positions: Tensor, shifts: Tensor) -> Tensor:
        """Return the vectors from each row's atom to its neighbours, Å, [R, K, 3]; zero in empty slots."""
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
    """Join the first sizes, and the others: [N, C]; N may be 0, which -1 would not take."""
    return values.reshape(math.prod(values.shape[:leading]), math.prod(values.shape[leading:]))


def _segment_sum(segments: Segments, values: Tensor, slots: Tensor | None = None) -> Tensor:
    """Sum over each owner's items: [N, C], or their K slots [N * K, C], or the slots [N, K] that they name.

    Never in less than float32.
    """
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.to(torch.float32)
    if segments.kernels:
        out: Tensor = torch.ops.hydrazero.segment_sum(segments.owner, values, slots, segments.count)
        return out
    if slots is not None:
        values = values.index_select(0, slots.reshape(-1))
    # Sizes of shapes, not len(): in a graph of variable sizes they stay variable.
    items = segments.owner.shape[0]
    if values.shape[0] != items:
        values = values.view(items, -1, values.shape[1]).sum(1)
    if values.is_cuda:
        return sum_in_order(segments, values)
    return values.new_zeros(segments.count, values.shape[1]).index_add(0, segments.owner, values)


def sum_in_order(segments: Segments, values: Tensor) -> Tensor:
    """Sum items [N, C] of each owner one after the other: [count, C].

    On a GPU `index_add` adds in whatever order its threads come by, so that no two runs are alike; on a CPU it is four
    times as fast as this.
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
    """To the opposite pair and back is nowhere: its own derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        flat = _flat(values, 2).index_select(0, slots.reverse.reshape(-1))
        return flat.view(values.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Opposite.apply(grads[0], ctx.slots), None


class _Own(Function):
    """Each slot's own atom's row of x: [A, ...] -> [R, K, ...]."""

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
