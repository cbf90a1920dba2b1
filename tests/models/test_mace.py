"""MACE's densities and products against sums over neighbours and Gaunt's coefficients, term by term."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from structures import batch_of, rattled_crystal, rattled_molecule, small_model, to_structure
from sympy.physics.wigner import real_gaunt
from torch import Tensor

from hydrazero.models.encoders.base import AtomInputs, EncoderSettings, PairGeometry
from hydrazero.models.encoders.density_products import DensityProducts
from hydrazero.models.encoders.harmonics import coupling, degree_slice, solid_harmonics
from hydrazero.models.encoders.mace import NeighbourDensity
from hydrazero.models.ops.slots import slots_of


@lru_cache
def gaunt(a: int, b: int, c: int) -> np.ndarray:
    """Integrals over the sphere of three orthonormal real harmonics, from closed formulas."""
    found = [
        [[float(real_gaunt(a, b, c, i, j, k)) for k in range(-c, c + 1)] for j in range(-b, b + 1)]
        for i in range(-a, a + 1)
    ]
    return np.array(found)


def product(f: Tensor, f_degree: int, g: Tensor, g_degree: int, degree: int) -> Tensor:
    """Coefficients [A, (l + 1)^2, F] of the product of two functions on the sphere, up to a degree."""
    out = f.new_zeros(len(f), (degree + 1) ** 2, f.shape[2])
    for a in range(f_degree + 1):
        for b in range(g_degree + 1):
            for c in range(abs(a - b), min(a + b, degree) + 1):
                # Our harmonics are orthonormal ones times the root of 4 pi / (2 l + 1).
                scale = np.sqrt((2 * c + 1) / ((2 * a + 1) * (2 * b + 1)) * 4 * np.pi)
                out[:, degree_slice(c)] += scale * torch.einsum(
                    "naf,nbf,abc->ncf", f[:, degree_slice(a)], g[:, degree_slice(b)], torch.from_numpy(gaunt(a, b, c))
                )
    return out


def inputs(atoms: Atoms, encoder: torch.nn.Module, features: int) -> tuple[AtomInputs, PairGeometry]:
    """Atoms with scalars of their own, as embeddings would give, and their measured pairs."""
    batch = batch_of([to_structure(atoms)], cutoff=encoder.settings.cutoff)
    slots = slots_of(batch)
    scalars = torch.randn(119, features, dtype=torch.float64)[batch.numbers]
    pairs = encoder.measure(slots, slots.pair_vectors(batch.positions, batch.shifts))
    return AtomInputs(numbers=batch.numbers, scalars=scalars), pairs


@pytest.mark.parametrize("degrees", [(1, 1, 2), (1, 2, 3), (2, 2, 2), (2, 3, 3)])
def test_couplings_are_gaunts(degrees):
    exact = gaunt(*degrees)
    np.testing.assert_allclose(coupling(*degrees), exact / np.linalg.norm(exact), atol=1e-14)


@pytest.mark.parametrize("out_degree", [1, 2])
def test_products_of_three_densities_are_two_couplings_one_after_the_other(out_degree):
    torch.manual_seed(1)
    settings = EncoderSettings(encoder="mace", features=3, max_degree=2, node_degree=out_degree, correlation=3)
    module = DensityProducts(settings).double()
    densities, kinds = torch.randn(4, 9, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    one, two, three = (factor(densities) for factor in module.factors)
    pair = product(one, 2, two, 2, 4)
    size = (out_degree + 1) ** 2
    terms = [one[:, :size], pair[:, :size], product(pair, 4, three, 2, out_degree)]
    degree_of = [degree for degree in range(out_degree + 1) for _ in range(2 * degree + 1)]
    weights = module.weights(kinds).view(4, 3, out_degree + 1, 3)[:, :, degree_of]
    total = sum(term * weights[:, order] for order, term in enumerate(terms))
    expected = module.out(total)
    torch.testing.assert_close(module(densities, kinds), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", [0, 1], ids=["scalars", "scalars and vectors"])
def test_densities_are_sums_over_neighbours(layer):
    torch.manual_seed(2)
    encoder = small_model("mace", features=4, max_degree=2).encoder
    module: NeighbourDensity = encoder.densities[layer]
    _, pairs = inputs(rattled_molecule("CH3OH"), encoder, 4)
    slots = pairs.slots
    nodes = torch.randn(slots.atoms, 1 + 3 * layer, 4, dtype=torch.float64)
    sent, radial = module.up(nodes), module.weights(module.radial(pairs.radial)).unflatten(-1, (-1, 4))
    expected = torch.zeros(slots.atoms, 9, 4, dtype=torch.float64)
    for row, slot in torch.nonzero(slots.mask).tolist():
        harmonics = solid_harmonics(pairs.directions[row, slot], 2)
        neighbour = sent[slots.neighbours[row, slot]]
        for path, (a, b, c) in enumerate(module.paths):
            exact = torch.from_numpy(gaunt(a, b, c) / np.linalg.norm(gaunt(a, b, c)))
            turned = torch.einsum("a,bf,abc->cf", harmonics[degree_slice(a)], neighbour[degree_slice(b)], exact)
            expected[slots.row_atom[row], degree_slice(c)] += turned * radial[row, slot, path]
    found = module(nodes, solid_harmonics(pairs.directions, 2), pairs)
    torch.testing.assert_close(found, module.down(expected / 10.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("atoms", [rattled_molecule(), bulk("Cu", cubic=True), rattled_crystal()])
def test_untrained_densities_are_of_a_size_at_which_their_products_count(atoms):
    torch.manual_seed(3)
    encoder = small_model("mace", features=32, radial_functions=20, cutoff=5.0).encoder
    given, pairs = inputs(atoms, encoder, 32)
    nodes = given.scalars.unsqueeze(1)
    found = encoder.densities[0](nodes, solid_harmonics(pairs.directions, 3), pairs)
    assert 0.02 < float(found.detach().square().mean().sqrt()) < 1.0


def test_what_conditions_an_atom_changes_it_with_and_without_neighbours():
    torch.manual_seed(4)
    encoder = small_model("mace").encoder
    for atoms in (rattled_molecule("H2O"), Atoms("O")):
        given, pairs = inputs(atoms, encoder, 16)
        told = AtomInputs(numbers=given.numbers, scalars=given.scalars + 0.1)
        before, after = encoder(given, pairs), encoder(told, pairs)
        assert float((after.scalars - before.scalars).abs().max()) > 1e-3
