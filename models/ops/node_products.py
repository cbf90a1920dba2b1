"""Products of node features on the CPU by C++ kernels: with matrices of degrees, and of 3 x 3 matrices of atoms.

What they compute without kernels is in `hydrazero.models.encoders.degree_features` and
`hydrazero.models.encoders.matrix_features`.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Step(IntEnum):
    """What a step computes from matrices A and B, where N(X) is X / (|X|^2 + 1)."""

    ANTICOMMUTATOR = 0
    """N(AB + BA)"""
    NORMALISED_RESIDUAL = 1
    """N(A + B + BB)"""
    RESIDUAL = 2
    """A + B + BB"""


def degree_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return features [A, (L + 1)^2, I] times the matrix [I, O] of their degree in weight [L + 1, I, O]."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return _DegreeLinear.apply(x.to(dtype), weight.to(dtype))


def matrix_step(a: Tensor, b: Tensor, kind: Step) -> Tensor:
    """Return the coefficients [A, 9, F] of a step for those of A and B; F is a multiple of FEATURE_TILE.

    The precision is at least float32. It can be differentiated twice, as training on forces needs.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return _MatrixStep.apply(a.to(dtype), b.to(dtype), int(kind))


class _DegreeLinear(Function):
    """(x, W) -> x W, for each degree; it is bilinear and so are its derivatives."""

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
        # Components are added one after the other: their sum is rounded once to a precision lower than float32.
        wide = torch.promote_types(x.dtype, torch.float32)
        out: Tensor = torch.ops.hydrazero.degree_outer(x.to(wide), g.to(wide), math.isqrt(x.shape[1]))
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        return _DegreeLinear.apply(g, grads[0].transpose(1, 2)), _DegreeLinear.apply(x, grads[0])


class _MatrixStep(Function):
    """(A, B) -> a step."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, kind: int) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(a, b)
        out: Tensor = torch.ops.hydrazero.matrix_step(a, b, kind)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        return *_MatrixStepGradients.apply(a, b, grads[0], ctx.kind), None


class _MatrixStepGradients(Function):
    """(A, B, G) -> the gradients of G times the step with respect to A and B."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        ctx.kind = kind
        ctx.save_for_backward(a, b, g)
        out: tuple[Tensor, Tensor] = torch.ops.hydrazero.matrix_step_gradients(a, b, g, kind)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, g = ctx.saved_tensors
        return *_MatrixStepCurvature.apply(a, b, g, *grads, ctx.kind), None


class _MatrixStepCurvature(Function):
    """(A, B, G, H, H') -> the gradients of H and H' times the above with respect to A, B and G."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, g: Tensor, for_a: Tensor, for_b: Tensor, kind: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        out: tuple[Tensor, Tensor, Tensor] = torch.ops.hydrazero.matrix_step_curvature(a, b, g, for_a, for_b, kind)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("The kernels of matrix steps have no third derivatives; compute without kernels.")
