"""LACE's densities against sums over neighbours, term by term."""

from __future__ import annotations

import pytest
import torch
from structures import batch_of, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.models.encoders.base import PairGeometry
from hydrazero.models.encoders.degree_features import TYPICAL_NEIGHBOURS
from hydrazero.models.encoders.harmonics import degree_slice, solid_harmonics
from hydrazero.models.encoders.lace import LinearDensity
from hydrazero.models.ops.pair_sums import PairFactors
from hydrazero.models.ops.slots import slots_of

FEATURES, DEGREE = 4, 3


def factors_of(pairs: PairGeometry, degree: int) -> PairFactors:
    harmonics = solid_harmonics(pairs.directions, degree)[..., 1:]
    return PairFactors(slots=pairs.slots, radial=pairs.radial, harmonics=harmonics)


@pytest.mark.parametrize("layer", [0, 1], ids=["scalars", "scalars and vectors"])
@pytest.mark.parametrize("atoms", [rattled_molecule("CH3OH"), rattled_crystal()], ids=["molecule", "crystal"])
@torch.no_grad()
def test_densities_are_sums_over_neighbours(layer, atoms):
    """Each neighbour adds its own features times w_l(r), and harmonics times its scalars d_l times v_l(r)."""
    encoder = small_model("lace", features=FEATURES, max_degree=DEGREE).encoder
    module: LinearDensity = encoder.layers[layer].density
    batch = batch_of([to_structure(atoms)], cutoff=encoder.settings.cutoff)
    slots = slots_of(batch)
    pairs = encoder.measure(slots, slots.pair_vectors(batch.positions, batch.shifts))
    node_degree = layer * encoder.settings.node_degree
    nodes = torch.randn(slots.atoms, (node_degree + 1) ** 2, FEATURES, dtype=torch.float64)
    sent = module.up(nodes).transpose(0, 1)
    scalars = module.scalars_out(torch.nn.functional.silu(module.scalars_in(nodes[:, 0]))).view(-1, DEGREE, FEATURES)
    expected = torch.zeros((DEGREE + 1) ** 2, slots.atoms, FEATURES, dtype=torch.float64)
    for row, slot in torch.nonzero(slots.mask).tolist():
        atom, neighbour = slots.row_atom[row], slots.neighbours[row, slot]
        of_tensors = (pairs.radial[row, slot] @ module.tensor_filter).view(-1, FEATURES)
        of_scalars = (pairs.radial[row, slot] @ module.scalar_filter).view(-1, FEATURES)
        harmonics = solid_harmonics(pairs.directions[row, slot], DEGREE)
        for degree in range(node_degree + 1):
            expected[degree_slice(degree), atom] += of_tensors[degree] * sent[degree_slice(degree), neighbour]
        for degree in range(1, DEGREE + 1):
            message = of_scalars[degree - 1] * scalars[neighbour, degree - 1]
            expected[degree_slice(degree), atom] += harmonics[degree_slice(degree), None] * message
    found = module(nodes, factors_of(pairs, DEGREE)).transpose(0, 1)
    torch.testing.assert_close(found, expected / TYPICAL_NEIGHBOURS, rtol=0, atol=1e-12)


@pytest.mark.parametrize("atoms", [rattled_molecule(), rattled_crystal()], ids=["molecule", "crystal"])
@torch.no_grad()
def test_untrained_densities_are_of_a_size_at_which_their_products_count(atoms):
    encoder = small_model("lace", features=32, radial_functions=8, cutoff=5.0).encoder
    batch = batch_of([to_structure(atoms)], cutoff=5.0)
    slots = slots_of(batch)
    pairs = encoder.measure(slots, slots.pair_vectors(batch.positions, batch.shifts))
    nodes = torch.randn(slots.atoms, 1, 32, dtype=torch.float64)
    found = encoder.layers[0].density(nodes, factors_of(pairs, 3))
    assert 0.02 < float(found.square().mean().sqrt()) < 2.0
