"""Matrices [3, 3] of node features, as coefficients [A, 9, F] of an orthonormal basis in the order of the harmonics.

The basis matrix of degree 0 is the identity, those of degree 1 are skew, and those of degree 2 symmetric and
traceless. The Frobenius norm of a matrix is that of its coefficients.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydrazero.models.encoders.harmonics import solid_harmonics, sphere_points
from hydrazero.models.ops.kernels import FEATURE_TILE
from hydrazero.models.ops.node_products import Step, matrix_step

DEGREE = 2
HARMONICS_AXES = (1, 2, 0)
"""The axes in the order of the harmonics of degree 1: y, z, x; the inverse of `CARTESIAN`."""


@lru_cache
def matrix_basis() -> NDArray[np.float64]:
    """Return nine orthonormal matrices in the order of the harmonics of degree 0, 1 and 2: [9, 3, 3]."""
    identity = np.eye(3)[None] / 3.0**0.5
    cross = np.zeros((3, 3, 3))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        cross[i, j, k], cross[i, k, j] = -1.0, 1.0  # cross[i] v is the cross product of the unit vector along i with v
    points, weights = sphere_points(2 * DEGREE)
    harmonics = solid_harmonics(torch.from_numpy(points), DEGREE).numpy()[:, 4:]
    symmetric = np.einsum("p,pm,pi,pj->mij", weights, harmonics, points, points)
    symmetric[abs(symmetric) < 1e-12] = 0.0
    symmetric /= np.linalg.norm(symmetric, axis=(1, 2), keepdims=True)
    return np.concatenate([identity, cross[list(HARMONICS_AXES)] / 2.0**0.5, symmetric])


BASIS = matrix_basis()


def _combined(factors: NDArray[np.float64], parts: tuple[Tensor, ...]) -> Tensor:
    """Return the sum of factors times parts; written out so that the compiler fuses its few terms into one loop."""
    terms = [float(factor) * part for factor, part in zip(factors, parts, strict=True) if factor]
    return sum(terms[1:], start=terms[0])


def matrices(x: Tensor) -> Tensor:
    """Return the matrices [3, 3, A, F] of coefficients [A, 9, F]."""
    parts = x.unbind(1)
    rows = [torch.stack([_combined(BASIS[:, i, j], parts) for j in range(3)]) for i in range(3)]
    return torch.stack(rows)


def coefficients(matrix: Tensor) -> Tensor:
    """Return the coefficients [A, 9, F] of matrices [3, 3, A, F]."""
    parts = matrix.flatten(0, 1).unbind(0)
    return torch.stack([_combined(element, parts) for element in BASIS.reshape(9, 9)], dim=1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of matrices [3, 3, A, F] for each atom and feature."""
    return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def normalised(x: Tensor) -> Tensor:
    """Return X / (|X|^2 + 1) of coefficients [A, 9, F] (TensorNet's norm is the squared Frobenius norm)."""
    return x * (1.0 / (x.square().sum(1, keepdim=True) + 1.0))


def normalised_products(a: Tensor, b: Tensor, *, kernels: bool = False) -> Tensor:
    """Return the normalised coefficients [A, 9, F] of AB + BA.

    The sum of both orders keeps the parity of each part, so that mirror images have the same energy. The C++ kernels
    need a multiple of FEATURE_TILE features.
    """
    if kernels and a.shape[2] % FEATURE_TILE == 0:
        return matrix_step(a, b, Step.ANTICOMMUTATOR)
    first, second = matrices(a), matrices(b)
    return normalised(coefficients(_product(first, second) + _product(second, first)))


def changed(x: Tensor, change: Tensor, *, normalise: bool, kernels: bool = False) -> Tensor:
    """Return the coefficients [A, 9, F] of X + C + CC for a change C, perhaps normalised, in the precision of X."""
    if kernels and x.shape[2] % FEATURE_TILE == 0:
        return matrix_step(x, change, Step.NORMALISED_RESIDUAL if normalise else Step.RESIDUAL).to(x.dtype)
    matrix = matrices(change)
    out = x + change + coefficients(_product(matrix, matrix)).to(x.dtype)
    return normalised(out) if normalise else out
