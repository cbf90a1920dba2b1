"""Products of node features on the CPU by C++ kernels: matrices of degrees, and 3 x 3 matrices of atoms.

Products are bilinear, and so are their derivatives, so one or two operators serve to any order. What they compute
without kernels is in `hydrazero.models.encoders.degree_features` and `hydrazero.models.encoders.matrix_features`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def degree_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return features [A, (L + 1)^2, I] times the matrix [I, O] of their degree in weight [L + 1, I, O]."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return _DegreeLinear.apply(x.to(dtype), weight.to(dtype))


def anticommutator(a: Tensor, b: Tensor) -> Tensor:
    """Return the coefficients of AB + BA for coefficients [A, 9, F] of matrices; F is a multiple of FEATURE_TILE."""
    dtype = _product_dtype(a, b)
    return _Anticommutator.apply(a.to(dtype), b.to(dtype), False)


def square(a: Tensor) -> Tensor:
    """Return the coefficients of AA for coefficients [A, 9, F] of matrices; F is a multiple of FEATURE_TILE."""
    return _Square.apply(a.to(_product_dtype(a)))


def normalised(x: Tensor) -> Tensor:
    """Return X / (|X|^2 + 1) for coefficients [A, 9, F] of matrices; F is a multiple of FEATURE_TILE."""
    return _Normalised.apply(x.to(_product_dtype(x)))


def _product_dtype(*operands: Tensor) -> torch.dtype:
    """Return the precision of products of features, which is at least float32."""
    dtype = torch.float32
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    return dtype


class _DegreeLinear(Function):
    """(x, W) -> x W, for each degree."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = torch.ops.hydrazero.degree_linear(x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return _DegreeLinear.apply(grads[0], weight.transpose(1, 2)), _DegreeOuter.apply(x, grads[0])


class _DegreeOuter(Function):
    """(x, g) -> the sum of x^T g over the atoms and components of each degree."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        degrees = round(x.shape[1] ** 0.5)
        out: Tensor = torch.ops.hydrazero.degree_outer(x, g, degrees)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        return _DegreeLinear.apply(g, grads[0].transpose(1, 2)), _DegreeLinear.apply(x, grads[0])


class _Anticommutator(Function):
    """(A, B) -> AB + BA, or AB^T + B^T A; derivatives have the same form, since (XY)^T = Y^T X^T."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(a, b)
        out: Tensor = torch.ops.hydrazero.matrix_anticommutator(a, b, transposed)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), g = ctx.saved_tensors, grads[0]
        for_a = _Anticommutator.apply(g, b, not ctx.transposed)
        for_b = _Anticommutator.apply(a, g, True) if ctx.transposed else _Anticommutator.apply(g, a, True)
        return for_a, for_b, None


class _Square(Function):
    """A -> AA, whose derivative needs one product where that of a product with itself needs two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        out: Tensor = torch.ops.hydrazero.matrix_anticommutator(a, a, False)
        return 0.5 * out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        out: Tensor = _Anticommutator.apply(grads[0], a, True)
        return out


class _Normalised(Function):
    """X -> X / (|X|^2 + 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = torch.ops.hydrazero.matrix_normalised(x, None, None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = _NormalisedGradient.apply(x, grads[0])
        return out


class _NormalisedGradient(Function):
    """(X, G) -> the derivative of the above along G, which is symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        out: Tensor = torch.ops.hydrazero.matrix_normalised(x, g, None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        return _NormalisedCurvature.apply(x, g, grads[0]), _NormalisedGradient.apply(x, grads[0])


class _NormalisedCurvature(Function):
    """(X, G, H) -> the gradient, with respect to X, of H times the derivative along G."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(x, g, h)
        out: Tensor = torch.ops.hydrazero.matrix_normalised(x, g, h)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Return third derivatives, which no training step needs, by plain PyTorch."""
        _, pull_back = torch.func.vjp(_curvature, *ctx.saved_tensors)
        out: tuple[Tensor, ...] = pull_back(grads[0])
        return out


def _curvature(x: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """Return the result of `_NormalisedCurvature`, whose formula is in cpp/matrix_norms.cpp."""
    along_g, along_h = (x * g).sum(1, keepdim=True), (x * h).sum(1, keepdim=True)
    r = 1.0 / (x.square().sum(1, keepdim=True) + 1.0)
    along_x = (g * h).sum(1, keepdim=True) - 4.0 * r * along_g * along_h
    return -2.0 * r * r * (along_h * g + along_g * h + along_x * x)
