"""Real spherical harmonics as polynomials, and products of functions on the sphere.

Normalised so that the harmonics of a degree l of two unit vectors multiply to the Legendre polynomial of their angle,
sum_m Y_lm(a) Y_lm(b) = P_l(a b) (addition theorem). Order: l = 0, 1, 2, ...; m = -l ... l; degree 1 is (y, z, x).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import lebedev_rule
from torch import Tensor

CARTESIAN = (2, 0, 1)
"""Positions of x, y, z among the three harmonics of degree 1."""


def degree_slice(degree: int) -> slice:
    """Return the positions of the harmonics of a degree."""
    return slice(degree * degree, (degree + 1) * (degree + 1))


def solid_harmonics(vectors: Tensor, degree: int) -> Tensor:
    """Return r^l Y_lm of vectors [..., 3] for all l up to a degree: [..., (degree + 1)^2].

    They are polynomials, so they are smooth everywhere, and zero at the origin except for l = 0. They are computed by
    the recursion of the associated Legendre functions in l and of the powers of x + i y in m (Helgaker, Jørgensen,
    Olsen 2000, sec. 6.4).
    """
    x, y, z = vectors.unbind(-1)
    square = x * x + y * y + z * z
    cosines, sines = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(degree):
        cosines, sines = [*cosines, x * cosines[-1] - y * sines[-1]], [*sines, x * sines[-1] + y * cosines[-1]]
    columns: dict[tuple[int, int], Tensor] = {}
    for m in range(degree + 1):
        legendre = [torch.full_like(z, float(math.prod(range(1, 2 * m, 2))))]
        for l in range(m + 1, degree + 1):  # noqa: E741
            step = (2 * l - 1) * z * legendre[-1]
            if l > m + 1:
                step = step - (l + m - 1) * square * legendre[-2]
            legendre.append(step / (l - m))
        for l, value in enumerate(legendre, start=m):  # noqa: E741
            norm = math.sqrt((1 if m == 0 else 2) * math.factorial(l - m) / math.factorial(l + m))
            columns[l, m] = norm * value * cosines[m]
            if m:
                columns[l, -m] = norm * value * sines[m]
    return torch.stack([columns[l, m] for l in range(degree + 1) for m in range(-l, l + 1)], dim=-1)  # noqa: E741


@lru_cache
def sphere_points(exact: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points [P, 3] and weights [P] that average polynomials up to the degree `exact` over the sphere exactly.

    They are Lebedev's: some two thirds of the points of a product of one-dimensional rules, and for each point they
    hold the opposite one too.
    """
    order = max(exact | 1, 3)
    while True:
        try:
            points, weights = lebedev_rule(order)
        except NotImplementedError:  # there are rules for most odd orders only
            order += 2
        else:
            return points.T, weights / (4.0 * np.pi)


@lru_cache
def sphere_tables(degree: int, exact: int, multiple: int = 1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the harmonics up to a degree on points, [(degree + 1)^2, P], and the weights of the points, [P].

    They average polynomials up to the degree `exact` exactly. Points of weight zero fill P up to a multiple.
    """
    points, weights = sphere_points(exact)
    filling = -len(weights) % multiple
    values = solid_harmonics(torch.from_numpy(points), degree).numpy().T
    return np.pad(values, ((0, 0), (0, filling))), np.pad(weights, (0, filling))


@lru_cache
def coupling(first: int, second: int, out: int) -> NDArray[np.float64]:
    """Return C with sum C[a, b, c] Y_a Y_b = the part of degree `out` of a product of two harmonics, scaled.

    [2 first + 1, 2 second + 1, 2 out + 1], of unit norm; zero unless first + second + out is even and they can form a
    triangle. These integrals of three harmonics (Gaunt's) are the Clebsch-Gordan coefficients, up to a factor, wherever
    parities are those of harmonics.
    """
    points, weights = sphere_points(first + second + out)
    values = solid_harmonics(torch.from_numpy(points), max(first, second, out)).numpy()
    one, two, three = (values[:, degree_slice(degree)] for degree in (first, second, out))
    found = np.einsum("p,pa,pb,pc->abc", weights, one, two, three)
    size = np.linalg.norm(found)
    return found / size if size > 1e-12 else np.zeros_like(found)


class Constants:
    """Exact numpy arrays, as tensors of any precision on any device, each of which is made once."""

    def __init__(self, **arrays: NDArray[np.float64]) -> None:
        self._arrays = arrays
        self._made: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def get(self, name: str, like: Tensor) -> Tensor:
        """Return an array in the precision and on the device of a tensor."""
        key = (name, like.dtype, like.device)
        if key in self._made:
            return self._made[key]
        made = torch.tensor(self._arrays[name].tolist(), dtype=like.dtype, device=like.device)
        # Not the placeholder of a tensor while a graph is traced, nor a tensor that cannot be differentiated later.
        if type(made) is Tensor and not made.is_inference():
            self._made[key] = made
        return made
