"""TensorNet against the paper's equations, on explicit edges and with explicit matrices for each feature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from scipy.spatial.transform import Rotation
from structures import CUTOFF, batch_of, rattled_crystal, rattled_molecule, small_model, to_structure
from torch import Tensor
from torch.nn.functional import silu

from hydrazero.models.encoders.base import AtomInputs
from hydrazero.models.encoders.harmonics import solid_harmonics
from hydrazero.models.encoders.matrix_features import coefficients, matrices, matrix_basis
from hydrazero.models.encoders.tensornet import NORMS, TensorEmbedding, TensorInteraction, TensorNet
from hydrazero.models.ops.slots import slots_of

IDENTITY = torch.eye(3, dtype=torch.float64)


def skew(u: Tensor) -> Tensor:
    """The matrices of the products u x v with other vectors v, written out: [..., 3] -> [..., 3, 3]."""
    x, y, z = u.unbind(-1)
    o = torch.zeros_like(x)
    rows = ((o, -z, y), (z, o, -x), (-y, x, o))
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def traceless(u: Tensor) -> Tensor:
    """The matrices u u^T - 1 / 3 of unit vectors."""
    return u.unsqueeze(-1) * u.unsqueeze(-2) - IDENTITY / 3


def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The multiple of the identity, the skew and the symmetric traceless part of matrices [..., 3, 3]."""
    trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)
    first = trace[..., None, None] * IDENTITY / 3
    second = (x - x.mT) / 2
    return first, second, x - first - second


def squared_norm(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1))


def mixed(x: Tensor, weights: Tensor) -> Tensor:
    """Each part of matrices [A, F, 3, 3] in a linear map of the features of its own."""
    return sum(torch.einsum("nfij,fg->ngij", part, weight) for part, weight in zip(parts(x), weights, strict=True))


class Edges:
    """Edges i <- j with their unit vectors from i to j, and N + 1 radial functions, of which the last is the cutoff."""

    def __init__(self, atoms: Atoms, encoder: TensorNet) -> None:
        i, j, vectors = neighbor_list("ijD", atoms, CUTOFF)
        self.i, self.j, vectors = torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(vectors)
        lengths = vectors.norm(dim=1, keepdim=True)
        self.units = vectors / lengths
        inside = encoder.cutoff_function(lengths, CUTOFF)
        self.radial = torch.cat([encoder.basis(lengths[:, 0]) * inside, inside], dim=1)

    def filters(self, weight: Tensor) -> list[tuple[Tensor, ...]]:
        """A filter [F, 1, 1] for each of the three parts, for every edge."""
        found = (self.radial @ weight).view(len(self.i), 3, -1, 1, 1)
        return [edge.unbind(0) for edge in found.unbind(0)]


def embedded(module: TensorEmbedding, scalars: Tensor, edges: Edges) -> Tensor:
    """Matrices [A, F, 3, 3] of the initial features [A, F]."""
    x = (module.own(scalars) + module.other(scalars))[:, :, None, None] * IDENTITY
    for i, j, u, filters in zip(edges.i, edges.j, edges.units, edges.filters(module.filter), strict=True):
        both = module.own(scalars[i]) + module.other(scalars[j])
        sums = filters[0] * IDENTITY + filters[1] * skew(u) + filters[2] * traceless(u)
        x[i] += both[:, None, None] * sums
    scales = module.scales(module.norm(squared_norm(x))).view(len(x), 3, -1)
    x = mixed(x, module.mix.weight)
    return sum(scales[:, n, :, None, None] * part for n, part in enumerate(parts(x)))


def interacted(module: TensorInteraction, x: Tensor, edges: Edges) -> Tensor:
    """Matrices [A, F, 3, 3] after one interaction."""
    x = x / (squared_norm(x) + 1)[..., None, None]
    y = mixed(x, module.before.weight)
    message = torch.zeros_like(y)
    for i, j, filters in zip(edges.i, edges.j, edges.filters(module.filter), strict=True):
        message[i] += sum(weight * part for weight, part in zip(filters, parts(y[j]), strict=True))
    both = y @ message + message @ y
    change = mixed(both / (squared_norm(both) + 1)[..., None, None], module.after.weight)
    return x + change + change @ change


def expected(encoder: TensorNet, scalars: Tensor, edges: Edges) -> tuple[Tensor, Tensor, Tensor]:
    """Scalars [A, F], vectors [A, 3, F] and matrices [A, F, 3, 3]."""
    x = embedded(encoder.embedding, scalars, edges)
    for interaction in encoder.interactions:
        x = interacted(interaction, x, edges)
    norms = torch.cat([squared_norm(part) for part in parts(x)], dim=1)
    # A skew matrix of a vector v has the norm sqrt(2) |v|, which is that of our coefficients.
    second = parts(x)[1]
    vectors = 2**0.5 * torch.stack([second[..., 2, 1], second[..., 0, 2], second[..., 1, 0]], dim=1)
    return silu(encoder.out(encoder.norm(norms))), vectors, x


@pytest.mark.parametrize("atoms", [rattled_molecule(), rattled_crystal()], ids=["molecule", "crystal"])
@torch.no_grad()
def test_it_is_that_of_explicit_matrices(atoms):
    """In the crystal, two atoms are neighbours through several images."""
    encoder = small_model("tensornet", features=8, radial_functions=6).encoder
    for parameter in encoder.parameters():  # norms begin as the identity
        torch.nn.init.normal_(parameter, std=0.5)
    batch = batch_of([to_structure(atoms)], extra=(0, 2, 1))
    slots = slots_of(batch)
    scalars = torch.randn(len(batch.numbers), 8, dtype=torch.float64)
    pairs = encoder.measure(slots, slots.pair_vectors(batch.positions, batch.shifts))
    found = encoder(AtomInputs(numbers=batch.numbers, scalars=scalars), pairs)

    edges = Edges(atoms, encoder)
    assert len(edges.i) == int(slots.mask.sum()) > 0
    wanted, vectors, x = expected(encoder, scalars[: len(atoms)], edges)
    assert all(squared_norm(part).max() > 1e-2 for part in parts(x))
    torch.testing.assert_close(found.scalars[: len(atoms)], wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.vectors[: len(atoms)], vectors, rtol=1e-10, atol=1e-10)


def unit_vectors(count: int) -> Tensor:
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((count, 3)))
    return vectors / vectors.norm(dim=1, keepdim=True)


def harmonic_matrices(u: Tensor, skew_sign: float = 1.0) -> Tensor:
    """The three matrices of the harmonics of degree 0, 1 and 2 of unit vectors [A, 3]: [A, 3, 3, 3]."""
    harmonics = solid_harmonics(u, 2)
    degrees = torch.zeros(len(u), 9, 3, dtype=torch.float64)  # each degree as a feature
    for degree, sign in enumerate((1.0, skew_sign, 1.0)):
        of_degree = slice(degree**2, (degree + 1) ** 2)
        degrees[:, of_degree, degree] = sign * harmonics[:, of_degree]
    return matrices(degrees).permute(2, 3, 0, 1)


def test_the_basis_of_matrices_is_orthonormal():
    basis = matrix_basis().reshape(9, 9)
    np.testing.assert_allclose(basis @ basis.T, np.eye(9), atol=1e-14)
    x = torch.randn(4, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(coefficients(matrices(x)), x, rtol=1e-13, atol=1e-13)


def test_matrices_of_harmonics_are_those_of_the_paper_up_to_their_norms():
    u = unit_vectors(7)
    found = harmonic_matrices(u) * torch.tensor(NORMS, dtype=torch.float64)[:, None, None]
    wanted = torch.stack([IDENTITY.expand(7, 3, 3), skew(u), traceless(u)], dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sign", [1, -1], ids=["rotation", "with inversion"])
def test_matrices_of_harmonics_turn_with_the_vector(sign):
    """A skew matrix does not change under inversion, while its harmonics of degree 1 change their sign."""
    u = unit_vectors(7)
    turn = sign * torch.from_numpy(Rotation.random(random_state=1).as_matrix())
    torch.testing.assert_close(
        turn @ harmonic_matrices(u) @ turn.T, harmonic_matrices(u @ turn.T, sign), rtol=1e-13, atol=1e-13
    )
