"""Harmonics and their products against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre
from structures import batch_of, rattled_molecule, small_model, to_structure

from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.encoders.density_products import DensityProducts
from hydrazero.models.encoders.dimenetpp import DirectionalInteraction
from hydrazero.models.encoders.harmonics import (
    CARTESIAN,
    coupling,
    degree_slice,
    solid_harmonics,
    sphere_points,
    sphere_tables,
)
from hydrazero.models.ops.slots import slots_of


def directions(count: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 3)))
    return vectors / vectors.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("degree", range(7))
def test_addition_theorem(degree):
    a, b = directions(20), directions(20, seed=1)
    part = degree_slice(degree)
    found = (solid_harmonics(a, 6)[:, part] * solid_harmonics(b, 6)[:, part]).sum(1)
    np.testing.assert_allclose(found, eval_legendre(degree, (a * b).sum(1).numpy()), atol=1e-13)


def test_the_first_degree_is_the_vector_and_all_but_the_zeroth_vanish_at_the_origin():
    a = 1.7 * directions(5)
    torch.testing.assert_close(solid_harmonics(a, 3)[:, 1:4][:, list(CARTESIAN)], a)
    at_origin = solid_harmonics(torch.zeros(1, 3, dtype=torch.float64), 6)[0]
    assert at_origin[0] == 1 and (at_origin[1:] == 0).all()


def test_points_average_harmonics_to_zero_and_their_squares_to_one_over_their_number():
    points, weights = sphere_points(12)
    values = solid_harmonics(torch.from_numpy(points), 6).numpy()
    overlap = np.einsum("p,pa,pb->ab", weights, values, values)
    expected = np.concatenate([np.full(2 * degree + 1, 1 / (2 * degree + 1)) for degree in range(7)])
    np.testing.assert_allclose(overlap, np.diag(expected), atol=1e-14)


def test_a_function_evaluated_and_expanded_is_itself():
    harmonics, weights = sphere_tables(3, 6, 8)
    assert len(weights) % 8 == 0
    lengths = np.concatenate([np.full(2 * degree + 1, 2 * degree + 1) for degree in range(4)])
    np.testing.assert_allclose(harmonics @ (weights * harmonics).T * lengths, np.eye(16), atol=1e-13)


def test_couplings_are_those_of_clebsch_and_gordan():
    """Two vectors couple to their product (l = 0), and to their traceless outer product (l = 2); not to l = 1."""
    a, b = directions(6), directions(6, seed=3)
    one, two = solid_harmonics(a, 1)[:, 1:4], solid_harmonics(b, 1)[:, 1:4]

    def coupled(out: int) -> torch.Tensor:
        return torch.einsum("na,nb,abc->nc", one, two, torch.from_numpy(coupling(1, 1, out)))

    scalar = coupled(0)[:, 0]
    torch.testing.assert_close(scalar / scalar[0], (a * b).sum(1) / (a[0] * b[0]).sum())
    assert (coupling(1, 1, 1) == 0).all()
    # |traceless symmetric part|^2 = (1 + cos^2 / 3) / 2 for unit vectors.
    size = coupled(2).square().sum(1)
    expected = 0.5 * (1 + (a * b).sum(1) ** 2 / 3)
    torch.testing.assert_close(size / size[0], expected / expected[0])


def test_products_on_points_are_products_of_functions():
    """DensityProducts of order 2 against the sum over all couplings of two densities, by explicit integrals."""
    torch.manual_seed(0)
    settings = EncoderSettings(encoder="mace", features=3, max_degree=2, node_degree=1, correlation=2)
    module = DensityProducts(settings).double()
    densities, kinds = torch.randn(4, 9, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    points, weights = sphere_points(2 * 2 + 1 + 6)  # finer than needed
    values = solid_harmonics(torch.from_numpy(points), 2)
    first = torch.einsum("pl,alf->apf", values, module.factors[0](densities))
    second = torch.einsum("pl,alf->apf", values, module.factors[1](densities))
    back = torch.from_numpy(weights)[:, None] * values[:, :4] * torch.tensor([1.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    own = module.weights(kinds).view(4, 2, 2, 3)[:, :, [0, 1, 1, 1]]
    terms = [torch.einsum("pl,apf->alf", back, product) for product in (first, first * second)]
    expected = module.out(terms[0] * own[:, 0] + terms[1] * own[:, 1])
    torch.testing.assert_close(module(densities, kinds), expected, rtol=0, atol=1e-12)


def test_densities_around_atoms_are_sums_over_triplets():
    """The messages of DimeNet++ against a loop over all triplets k -> j -> i with k other than i."""
    torch.manual_seed(0)
    batch = batch_of([to_structure(rattled_molecule("CH3OH"))])
    model = small_model("dimenetpp", max_degree=3)
    slots = slots_of(batch)
    pairs = model.encoder.measure(slots, slots.pair_vectors(batch.positions, batch.shifts))
    block = model.encoder.interactions[0]
    assert isinstance(block, DirectionalInteraction)
    incoming = torch.randn(*slots.mask.shape, block.inner, dtype=torch.float64)
    found = slots.opposite(block.around(incoming, solid_harmonics(pairs.directions, 3), pairs))
    weights = block.angular(pairs.radial).unflatten(-1, (4, block.inner))
    real = [(r, k) for r in range(slots.mask.shape[0]) for k in range(8) if slots.mask[r, k]]
    for r, k in real:
        i, j = int(slots.row_atom[r]), int(slots.neighbours[r, k])
        expected = torch.zeros(block.inner, dtype=torch.float64)
        for row, slot in real:
            if int(slots.row_atom[row]) != j or int(slots.neighbours[row, slot]) == i:
                continue
            to_i = batch.positions[i] - batch.positions[j]
            cosine = float((pairs.directions[row, slot] * to_i).sum() / to_i.norm())
            legendre = torch.tensor([eval_legendre(degree, cosine) for degree in range(4)])
            expected += (legendre.unsqueeze(1) * weights[row, slot]).sum(0) * incoming[row, slot]
        torch.testing.assert_close(found[r, k], expected, rtol=0, atol=1e-12)
