"""Products of functions on the sphere, which atoms hold as coefficients of spherical harmonics.

Functions f_1 ... f_K of an atom and feature, each with coefficients f_ic, are multiplied on P points of the sphere, and
the averages of the product with the harmonics are taken: sum_p w_p Y_c(p) f_1(p) ... f_K(p). With enough points that is
exact. Couplings of all degrees are taken at once, at a cost that grows with the third power of the highest degree
instead of its sixth (Luo, Chen, Krishnapriyan 2024, arXiv 2401.10216).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hydrazero.models.ops.exact import exact_matmul

MOST_FACTORS = 4
"""The C++ kernels multiply at most this many functions."""
POINT_TILE = 8
"""The C++ kernels take points in groups of this many; tables are filled up with points of weight zero."""


@dataclass(frozen=True, kw_only=True)
class Sphere:
    """Points on the sphere with the values of harmonics on them."""

    harmonics: Tensor
    """Harmonics on the points, [C, P]."""
    weights: Tensor
    """Weights of the points, [P], which add up to 1."""


def sphere_product(factors: Sequence[Tensor], sphere: Sphere, components: int, *, kernels: bool = False) -> Tensor:
    """Return the averages [A, components, F] of a product of functions [A, C_i, F] with the first harmonics.

    The C++ kernels need 2 to `MOST_FACTORS` factors, points in a multiple of `POINT_TILE` and features in a multiple of
    `FEATURE_TILE`.
    """
    dtype = torch.float32
    for factor in factors:
        dtype = torch.promote_types(dtype, factor.dtype)
    wide = [factor.to(dtype) for factor in factors]
    harmonics, weights = sphere.harmonics.to(dtype).contiguous(), sphere.weights.to(dtype).contiguous()
    if kernels:
        out: Tensor = _Product.apply(harmonics, weights, components, *wide)
        return out
    return plain_product(harmonics, weights, components, *wide)


def plain_product(harmonics: Tensor, weights: Tensor, components: int, *factors: Tensor) -> Tensor:
    """Return what `sphere_product` does, by plain PyTorch."""
    on_points = [exact_matmul(harmonics[: factor.shape[1]].t(), factor) for factor in factors]  # [A, P, F]
    product = math.prod(on_points[1:], start=on_points[0])
    return exact_matmul(harmonics[:components] * weights, product)


class _Product(Function):
    """Factors -> the averages of their product with harmonics."""

    @staticmethod
    def forward(ctx: Any, harmonics: Tensor, weights: Tensor, components: int, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(harmonics, weights, *factors)
        out: Tensor = torch.ops.hydrazero.sphere_product(factors, harmonics, weights, components)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        harmonics, weights, *factors = ctx.saved_tensors
        return None, None, None, *_Gradients.apply(harmonics, weights, grads[0], *factors)


class _Gradients(Function):
    """(h, factors) -> the gradients of h times the product with respect to each factor."""

    @staticmethod
    def forward(ctx: Any, harmonics: Tensor, weights: Tensor, h: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(harmonics, weights, h, *factors)
        return tuple(torch.ops.hydrazero.sphere_gradients(factors, harmonics, weights, h))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_Curvatures.apply(len(grads), *ctx.saved_tensors, *grads)


class _Curvatures(Function):
    """(h, factors, directions) -> the gradients of the sum of directions times those gradients."""

    @staticmethod
    def forward(ctx: Any, count: int, harmonics: Tensor, weights: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        ctx.count = count
        ctx.save_for_backward(harmonics, weights, *rest)
        h, factors, along = rest[0], rest[1 : 1 + count], rest[1 + count :]
        return tuple(torch.ops.hydrazero.sphere_curvatures(factors, harmonics, weights, h, along))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return third derivatives, which no training step needs, by plain PyTorch."""
        harmonics, weights, *rest = ctx.saved_tensors

        def curvatures(*operands: Tensor) -> tuple[Tensor, ...]:
            h, factors, along = operands[0], operands[1 : 1 + ctx.count], operands[1 + ctx.count :]

            def gradients(h: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
                pull_back = torch.func.vjp(
                    lambda *given: plain_product(harmonics, weights, h.shape[1], *given), *factors
                )[1]
                out: tuple[Tensor, ...] = pull_back(h)
                return out

            pull_back = torch.func.vjp(gradients, h, *factors)[1]
            out: tuple[Tensor, ...] = pull_back(tuple(along))
            return out

        pull_back = torch.func.vjp(curvatures, *rest)[1]
        return None, None, None, *pull_back(tuple(grads))
