"""Gathers over neighbour slots whose derivatives are gathers too: no scatter, no atomics, any order of differentiation.

Slot (n, k) holds the pair from neighbour m = neighbours[n, k] to receiver n, and reverse[n, k] is the slot of the pair
from n to m. Summing slots by their neighbour is therefore a gather through `reverse` and a sum over k. An empty slot
points at its own atom and at itself; what flows through it must be masked by the caller.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, neighbours: Tensor, reverse: Tensor) -> Tensor:
        ctx.save_for_backward(neighbours, reverse)
        flat = x.reshape(x.shape[0], -1).index_select(0, neighbours.reshape(-1))
        return flat.view(*neighbours.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        neighbours, reverse = ctx.saved_tensors
        return _SumBySender.apply(grads[0], neighbours, reverse), None, None


class _SumBySender(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, neighbours: Tensor, reverse: Tensor) -> Tensor:
        ctx.save_for_backward(neighbours, reverse)
        n, k = neighbours.shape
        flat = values.reshape(n * k, -1).index_select(0, reverse.reshape(-1))
        return flat.view(n, k, -1).sum(1).view(n, *values.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        neighbours, reverse = ctx.saved_tensors
        return _Gather.apply(grads[0], neighbours, reverse), None, None


def gather_neighbours(x: Tensor, neighbours: Tensor, reverse: Tensor) -> Tensor:
    """Return x[neighbours]: [A, ...] -> [A, K, ...]."""
    return _Gather.apply(x, neighbours, reverse)


def pair_vectors(positions: Tensor, neighbours: Tensor, reverse: Tensor, shifts: Tensor) -> Tensor:
    """Return the vectors from each receiver to its neighbours, Å, [A, K, 3]; zero in empty slots."""
    return gather_neighbours(positions, neighbours, reverse) - positions[:, None] + shifts
