"""Sums over neighbours of node features times filters of the distance, without storing the filters.

All of them are derivatives of one form, linear in each argument, over the slots (r, k) of atom n with neighbour j:

    T = sum w1 gs[n] s[j] + w2 sum_c gv[n, c] y[j, c] + w3 d[j] sum_c u_c gv[n, c],   w_p = sum_b radial_b W_p[b]

with radial functions [R, 8, B], directions u [R, 8, 3], weight W [B, 3F], node features s [A, F], y [A, 3, F], d [A,
F] and factors of the result gs [A, F], gv [A, 3, F]. Each operator is the derivative of T with respect to
one of them, so the derivatives of the operators are operators again, to any order. The neighbour list is full,
radial is the same in both slots of a pair and u changes sign: the derivative with respect to s, y, d sums over an
atom's own slots like the form itself, and nothing is scattered. If s and gs, or y, are None, their path is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hydrazero.models.ops.exact import exact_matmul
from hydrazero.models.ops.kernels import FEATURE_TILE
from hydrazero.models.ops.slots import Slots

MaybeTensor = Tensor | None


def pair_sum(
    slots: Slots, radial: Tensor, directions: Tensor, weight: Tensor, features: tuple[MaybeTensor, MaybeTensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return dT/dgs [A, F] and dT/dgv [A, 3, F] of the features (s, y, d), by the kernels if `slots.kernels` is set.

    Sums are in the precision of the geometry, even if weight and features have a lower one.
    """
    s, y, d = features
    s, y = (None if x is None else x.to(radial.dtype) for x in (s, y))
    d, weight = d.to(radial.dtype), weight.to(radial.dtype)
    if slots.kernels and d.shape[1] % FEATURE_TILE == 0:
        return _PairSum.apply(slots, radial, directions, weight, s, y, d)
    return _plain_pair_sum(slots, radial, directions, weight, (s, y, d))


def _plain_pair_sum(
    slots: Slots, radial: Tensor, directions: Tensor, weight: Tensor, features: tuple[MaybeTensor, MaybeTensor, Tensor]
) -> tuple[Tensor, Tensor]:
    s, y, d = features
    filters = exact_matmul(radial, weight).chunk(3, dim=-1)
    scalars = d.new_zeros(d.shape) if s is None else slots.sum_rows((filters[0] * slots.gather(s)).sum(1))
    # Directions [R, 3, K] times messages [R, K, F] are summed over the slots without an array [R, K, 3, F].
    vectors = exact_matmul(directions.transpose(1, 2), filters[2] * slots.gather(d))
    if y is not None:
        vectors = vectors + (filters[1].unsqueeze(2) * slots.gather(y)).sum(1)
    return scalars, slots.sum_rows(vectors)


def _index(slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    return slots.row_atom, slots.neighbours, slots.mask


class _PairSum(Function):
    """(radial, u, W, s, y, d) -> dT/dgs, dT/dgv."""

    @staticmethod
    def forward(
        ctx: Any,
        slots: Slots,
        radial: Tensor,
        directions: Tensor,
        weight: Tensor,
        s: MaybeTensor,
        y: MaybeTensor,
        d: MaybeTensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.slots = slots
        ctx.save_for_backward(radial, directions, weight, s, y, d)
        out: tuple[Tensor, Tensor] = torch.ops.hydrazero.pair_sum(
            *_index(slots), radial, directions, weight, s, y, d, slots.atoms
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[MaybeTensor, ...]:
        radial, directions, weight, s, y, d = ctx.saved_tensors
        gs, gv = grads if s is not None else (None, grads[1])
        geometry = (ctx.slots, radial, directions)
        for_radial, for_directions = _PairGradient.apply(*geometry, weight, s, y, d, gs, gv)
        for_weight = _PairWeightGradient.apply(*geometry, s, y, d, gs, gv)
        for_s, for_y, for_d = _transposed(*geometry, weight, gs, gv, y is not None)
        return None, for_radial, for_directions, for_weight, for_s, for_y, for_d


def _transposed(
    slots: Slots, radial: Tensor, directions: Tensor, weight: Tensor, gs: MaybeTensor, gv: Tensor, with_vectors: bool
) -> tuple[MaybeTensor, MaybeTensor, Tensor]:
    """Return dT/ds, dT/dy and dT/dd; None for paths that are left out."""
    s, y, d = _PairSumTransposed.apply(slots, radial, directions, weight, gs, gv, with_vectors)
    return (None if gs is None else s), (y if with_vectors else None), d


class _PairSumTransposed(Function):
    """(radial, u, W, gs, gv) -> dT/ds, dT/dy, dT/dd."""

    @staticmethod
    def forward(
        ctx: Any,
        slots: Slots,
        radial: Tensor,
        directions: Tensor,
        weight: Tensor,
        gs: MaybeTensor,
        gv: Tensor,
        with_vectors: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.slots, ctx.with_vectors = slots, with_vectors
        ctx.save_for_backward(radial, directions, weight, gs, gv)
        out: tuple[Tensor, Tensor, Tensor] = torch.ops.hydrazero.pair_sum_transposed(
            *_index(slots), radial, directions, weight, gs, gv, with_vectors
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[MaybeTensor, ...]:
        radial, directions, weight, gs, gv = ctx.saved_tensors
        s = None if gs is None else grads[0]
        y = grads[1] if ctx.with_vectors else None
        d = grads[2]
        geometry = (ctx.slots, radial, directions)
        for_radial, for_directions = _PairGradient.apply(*geometry, weight, s, y, d, gs, gv)
        for_weight = _PairWeightGradient.apply(*geometry, s, y, d, gs, gv)
        for_gs, for_gv = _PairSum.apply(*geometry, weight, s, y, d)
        return None, for_radial, for_directions, for_weight, (None if gs is None else for_gs), for_gv, None


class _PairGradient(Function):
    """(radial, u, W, s, y, d, gs, gv) -> dT/dradial, dT/du."""

    @staticmethod
    def forward(
        ctx: Any,
        slots: Slots,
        radial: Tensor,
        directions: Tensor,
        weight: Tensor,
        s: MaybeTensor,
        y: MaybeTensor,
        d: Tensor,
        gs: MaybeTensor,
        gv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.slots = slots
        ctx.save_for_backward(radial, directions, weight, s, y, d, gs, gv)
        out: tuple[Tensor, Tensor] = torch.ops.hydrazero.pair_gradient(
            *_index(slots), radial, directions, weight, s, y, d, gs, gv
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[MaybeTensor, ...]:
        """Return the derivatives of T(h, u) + T3(radial, k), where T3 is the third path of T alone."""
        radial, directions, weight, s, y, d, gs, gv = ctx.saved_tensors
        h, k = grads
        slots = ctx.slots
        for_weight = _PairWeightGradient.apply(slots, h, directions, s, y, d, gs, gv)
        for_weight = for_weight + _PairWeightGradient.apply(slots, radial, k, None, None, d, None, gv)
        for_s, for_y, for_d = _transposed(slots, h, directions, weight, gs, gv, y is not None)
        for_d = for_d + _transposed(slots, radial, k, weight, None, gv, False)[2]
        for_gs, for_gv = _PairSum.apply(slots, h, directions, weight, s, y, d)
        for_gv = for_gv + _PairSum.apply(slots, radial, k, weight, None, None, d)[1]
        for_radial, _ = _PairGradient.apply(slots, radial, k, weight, None, None, d, None, gv)
        _, for_directions = _PairGradient.apply(slots, h, directions, weight, None, None, d, None, gv)
        return (
            None,
            for_radial,
            for_directions,
            for_weight,
            for_s,
            for_y,
            for_d,
            None if gs is None else for_gs,
            for_gv,
        )


class _PairWeightGradient(Function):
    """(radial, u, s, y, d, gs, gv) -> dT/dW."""

    @staticmethod
    def forward(
        ctx: Any,
        slots: Slots,
        radial: Tensor,
        directions: Tensor,
        s: MaybeTensor,
        y: MaybeTensor,
        d: Tensor,
        gs: MaybeTensor,
        gv: Tensor,
    ) -> Tensor:
        ctx.slots = slots
        ctx.save_for_backward(radial, directions, s, y, d, gs, gv)
        out: Tensor = torch.ops.hydrazero.pair_weight_gradient(*_index(slots), radial, directions, s, y, d, gs, gv)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[MaybeTensor, ...]:
        radial, directions, s, y, d, gs, gv = ctx.saved_tensors
        weight = grads[0]
        geometry = (ctx.slots, radial, directions)
        for_radial, for_directions = _PairGradient.apply(*geometry, weight, s, y, d, gs, gv)
        for_s, for_y, for_d = _transposed(*geometry, weight, gs, gv, y is not None)
        for_gs, for_gv = _PairSum.apply(*geometry, weight, s, y, d)
        return None, for_radial, for_directions, for_s, for_y, for_d, (None if gs is None else for_gs), for_gv
