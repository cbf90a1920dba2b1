"""Sums over neighbours of node features times filters of the distance, without storing the filters.

All of them are derivatives of one form, over the slots (r, k) of atom n with neighbour j and the degrees l = 0 ... L:

    T = sum w_l g_l[n] . x_l[j] + v_l (g_l[n] . Y_l) d_l[j],   w_l = sum_b radial_b W_l[b],  v_l = sum_b radial_b V_l[b]

with radial functions [R, 8, B], harmonics Y of the directions of degrees 1 to L [R, 8, (L + 1)^2 - 1], tensors x [A,
(L + 1)^2, F] (or of degree 0 alone, [A, 1, F], or of the degrees 1 to L) with weights W [B, F] for each degree,
scalars d [A, L, F] for the degrees 1 to L with weights V [B, L F], and factors of the result g [A, (L + 1)^2, F]. T is
linear in each of radial, Y, (W, V), (x, d) and g. Each operator is the derivative of T with respect to one of them, so
the derivatives of the operators are operators again, to any order. The neighbour list is full, radial is the same in
both slots of a pair and Y_l(-u) = (-1)^l Y_l(u): the derivative with respect to x and d sums over an atom's own slots
like the form itself, and nothing is scattered. The basis of a degree is the caller's: for degree 1, Y may be the
directions themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hydrazero.models.ops.exact import exact_matmul
from hydrazero.models.ops.kernels import FEATURE_TILE, KERNEL_DEGREE, degrees_of
from hydrazero.models.ops.slots import Slots

MaybeTensor = Tensor | None


@dataclass(frozen=True, kw_only=True)
class PairFactors:
    """What the two atoms of a pair share: R rows of 8 slots."""

    slots: Slots
    radial: Tensor
    """B radial functions of the distance, [R, 8, B]; zero in empty slots."""
    harmonics: Tensor
    """Harmonics of the direction for the degrees 1 to L, [R, 8, (L + 1)^2 - 1]; zero in empty slots."""

    @property
    def degree(self) -> int:
        """The highest degree L."""
        return math.isqrt(self.harmonics.shape[2] + 1) - 1


@dataclass(frozen=True, kw_only=True)
class Path:
    """Features of neighbours, and the weights that make their filters from the radial functions."""

    features: Tensor
    """[A, C, F]."""
    weight: Tensor
    """[B, D F], where D is the number of degrees of the features."""


def pair_sum(pairs: PairFactors, tensors: Path | None, scalars: Path | None) -> Tensor:
    """Return dT/dg [A, (L + 1)^2, F], by the kernels if `pairs.slots.kernels` is set.

    Tensors have (L + 1)^2 components, 1 for degree 0 alone, or one less than all for the degrees 1 to L; scalars have
    one component for each degree from 1 to L. One of both may be None. Sums are in the precision of the geometry, even
    if weights and features have a lower one. Raises ValueError if both are None.
    """
    dtype = pairs.radial.dtype
    x, w = (None, None) if tensors is None else (tensors.features.to(dtype), tensors.weight.to(dtype))
    d, v = (None, None) if scalars is None else (scalars.features.to(dtype), scalars.weight.to(dtype))
    some = x if x is not None else d
    if some is None:
        raise ValueError("A sum over neighbours needs tensors or scalars.")
    if pairs.slots.kernels and some.shape[2] % FEATURE_TILE == 0 and pairs.degree <= KERNEL_DEGREE:
        return _PairSum.apply(pairs.slots, pairs.radial, pairs.harmonics, w, v, x, d)
    return _plain_pair_sum(pairs, (w, v), (x, d))


def _plain_pair_sum(
    pairs: PairFactors, weights: tuple[MaybeTensor, MaybeTensor], features: tuple[MaybeTensor, MaybeTensor]
) -> Tensor:
    (w, v), (x, d) = weights, features
    slots, degree = pairs.slots, pairs.degree
    sizes = [2 * l + 1 for l in range(degree + 1)]  # noqa: E741
    parts: list[Tensor | None] = [None] * (degree + 1)
    if x is not None and w is not None:
        first, last = degrees_of(x.shape[1])
        columns = [x.shape[2]] * (last + 1 - first)
        found = zip(_split(x, sizes[first : last + 1], 1), _split(w, columns, 1), strict=True)
        for l, (part, weight) in enumerate(found, start=first):  # noqa: E741
            filters = exact_matmul(pairs.radial, weight)
            parts[l] = (filters.unsqueeze(2) * slots.gather(part)).sum(1)
    if d is not None and v is not None:
        harmonics = _split(pairs.harmonics, sizes[1:], 2)
        for l, weight in enumerate(_split(v, [d.shape[2]] * degree, 1), start=1):  # noqa: E741
            messages = exact_matmul(pairs.radial, weight) * slots.gather(d[:, l - 1])
            # Harmonics [R, m, K] times messages [R, K, F] are summed over the slots without an array [R, K, m, F].
            parts[l] = _sum(parts[l], exact_matmul(harmonics[l - 1].transpose(1, 2), messages))
    rows, width = slots.row_atom.shape[0], (x if x is not None else d).shape[2]  # type: ignore[union-attr]
    filled = [
        pairs.radial.new_zeros(rows, size, width) if part is None else part
        for part, size in zip(parts, sizes, strict=True)
    ]
    return slots.sum_rows(torch.cat(filled, dim=1))


def _split(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    """Split an axis; an only part is the tensor itself, since compiled graphs fail on the gradient of such a split."""
    return (x,) if len(sizes) == 1 else x.split(sizes, dim=dim)


def _index(slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    return slots.row_atom, slots.neighbours, slots.mask


def _present(out: tuple[Tensor, Tensor], tensors: bool, scalars: bool) -> tuple[MaybeTensor, MaybeTensor]:
    """Return the results of an operator for both paths; None for a path that is left out."""
    return (out[0] if tensors else None), (out[1] if scalars else None)


def _sum(*both: MaybeTensor) -> MaybeTensor:
    """Return the sum of those that are not None."""
    held = [tensor for tensor in both if tensor is not None]
    return None if not held else held[0] if len(held) == 1 else held[0] + held[1]


class _PairSum(Function):
    """(radial, Y, W, V, x, d) -> dT/dg."""

    @staticmethod
    def forward(
        ctx: Any,
        slots: Slots,
        radial: Tensor,
        harmonics: Tensor,
        w: MaybeTensor,
        v: MaybeTensor,
        x: MaybeTensor,
        d: MaybeTensor,
    ) -> Tensor:
        ctx.slots = slots
        ctx.save_for_backward(radial, harmonics, w, v, x, d)
        out: Tensor = torch.ops.hydrazero.pair_sum(*_index(slots), radial, harmonics, w, v, x, d)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[MaybeTensor, ...]:
        radial, harmonics, w, v, x, d = ctx.saved_tensors
        geometry, g = (ctx.slots, radial, harmonics), grads[0]
        for_radial, for_harmonics = _PairGradient.apply(*geometry, w, v, x, d, g)
        for_w, for_v = _weight_gradient(*geometry, x, d, g)
        for_x, for_d = _transposed(*geometry, w, v, g, 0 if x is None else x.shape[1])
        return None, for_radial, for_harmonics, for_w, for_v, for_x, for_d


def _transposed(
    slots: Slots, radial: Tensor, harmonics: Tensor, w: MaybeTensor, v: MaybeTensor, g: Tensor, components: int
) -> tuple[MaybeTensor, MaybeTensor]:
    """Return dT/dx, of a number of components, and dT/dd; None for paths that are left out."""
    out = _PairSumTransposed.apply(slots, radial, harmonics, w, v, g, components)
    return _present(out, components > 0, v is not None)


class _PairSumTransposed(Function):
    """(radial, Y, W, V, g) -> dT/dx, dT/dd."""

    @staticmethod
    def forward(
        ctx: Any,
        slots: Slots,
        radial: Tensor,
        harmonics: Tensor,
        w: MaybeTensor,
        v: MaybeTensor,
        g: Tensor,
        components: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.slots, ctx.components = slots, components
        ctx.save_for_backward(radial, harmonics, w, v, g)
        out: tuple[Tensor, Tensor] = torch.ops.hydrazero.pair_sum_transposed(
            *_index(slots), radial, harmonics, w, v, g, components
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[MaybeTensor, ...]:
        radial, harmonics, w, v, g = ctx.saved_tensors
        x, d = _present((grads[0], grads[1]), ctx.components > 0, v is not None)
        geometry = (ctx.slots, radial, harmonics)
        for_radial, for_harmonics = _PairGradient.apply(*geometry, w, v, x, d, g)
        for_w, for_v = _weight_gradient(*geometry, x, d, g)
        for_g = _PairSum.apply(*geometry, w, v, x, d)
        return None, for_radial, for_harmonics, for_w, for_v, for_g, None


class _PairGradient(Function):
    """(radial, Y, W, V, x, d, g) -> dT/dradial, dT/dY."""

    @staticmethod
    def forward(
        ctx: Any,
        slots: Slots,
        radial: Tensor,
        harmonics: Tensor,
        w: MaybeTensor,
        v: MaybeTensor,
        x: MaybeTensor,
        d: MaybeTensor,
        g: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.slots = slots
        ctx.save_for_backward(radial, harmonics, w, v, x, d, g)
        out: tuple[Tensor, Tensor] = torch.ops.hydrazero.pair_gradient(*_index(slots), radial, harmonics, w, v, x, d, g)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[MaybeTensor, ...]:
        """Return the derivatives of T(h, Y) + T2(radial, k), where T2 is the path of the scalars alone."""
        radial, harmonics, w, v, x, d, g = ctx.saved_tensors
        slots, (h, k) = ctx.slots, grads
        components = 0 if x is None else x.shape[1]
        for_w, for_v = _weight_gradient(slots, h, harmonics, x, d, g)
        for_x, for_d = _transposed(slots, h, harmonics, w, v, g, components)
        for_g = _PairSum.apply(slots, h, harmonics, w, v, x, d)
        if d is None:
            return None, None, None, for_w, None, for_x, None, for_g
        for_v = _sum(for_v, _weight_gradient(slots, radial, k, None, d, g)[1])
        for_d = _sum(for_d, _transposed(slots, radial, k, None, v, g, 0)[1])
        for_g = for_g + _PairSum.apply(slots, radial, k, None, v, None, d)
        for_radial, _ = _PairGradient.apply(slots, radial, k, None, v, None, d, g)
        _, for_harmonics = _PairGradient.apply(slots, h, harmonics, None, v, None, d, g)
        return None, for_radial, for_harmonics, for_w, for_v, for_x, for_d, for_g


def _weight_gradient(
    slots: Slots, radial: Tensor, harmonics: Tensor, x: MaybeTensor, d: MaybeTensor, g: Tensor
) -> tuple[MaybeTensor, MaybeTensor]:
    """Return dT/dW and dT/dV; None for paths that are left out."""
    return _present(_PairWeightGradient.apply(slots, radial, harmonics, x, d, g), x is not None, d is not None)


class _PairWeightGradient(Function):
    """(radial, Y, x, d, g) -> dT/dW, dT/dV."""

    @staticmethod
    def forward(
        ctx: Any, slots: Slots, radial: Tensor, harmonics: Tensor, x: MaybeTensor, d: MaybeTensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.slots = slots
        ctx.save_for_backward(radial, harmonics, x, d, g)
        out: tuple[Tensor, Tensor] = torch.ops.hydrazero.pair_weight_gradient(
            *_index(slots), radial, harmonics, x, d, g
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[MaybeTensor, ...]:
        radial, harmonics, x, d, g = ctx.saved_tensors
        w, v = _present((grads[0], grads[1]), x is not None, d is not None)
        geometry = (ctx.slots, radial, harmonics)
        for_radial, for_harmonics = _PairGradient.apply(*geometry, w, v, x, d, g)
        for_x, for_d = _transposed(*geometry, w, v, g, 0 if x is None else x.shape[1])
        for_g = _PairSum.apply(*geometry, w, v, x, d)
        return None, for_radial, for_harmonics, for_x, for_d, for_g
