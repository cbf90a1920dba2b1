"""DimeNet++ without triplets against one that lists them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.special import eval_legendre
from structures import batch_of, predict, rattled_crystal, rattled_molecule, small_model, to_structure
from torch import Tensor
from torch_geometric.nn.models.dimenet import InteractionPPBlock

from hydrazero.models.encoders.base import PairGeometry
from hydrazero.models.encoders.dimenetpp import DimeNetPlusPlus, DirectionalInteraction
from hydrazero.models.encoders.harmonics import solid_harmonics
from hydrazero.models.ops.slots import slots_of

DEGREE = 3


def measured(atoms: Atoms, encoder: DimeNetPlusPlus) -> PairGeometry:
    batch = batch_of([to_structure(atoms)])
    slots = slots_of(batch)
    return encoder.measure(slots, slots.pair_vectors(batch.positions, batch.shifts))


def triplets(pairs: PairGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Flat slots of k -> j and of j -> i, the very pair i -> j left out, and the cosines of their angles at j."""
    slots = pairs.slots
    real = torch.arange(slots.mask.numel())[slots.mask.reshape(-1)]
    ends_at = slots.row_atom.repeat_interleave(slots.mask.shape[1])
    directions, reverse = pairs.directions.reshape(-1, 3), slots.reverse.reshape(-1)
    first, second, cosines = [], [], []
    for ji in real.tolist():
        back = int(reverse[ji])
        for kj in real.tolist():
            if ends_at[kj] == slots.neighbours.reshape(-1)[ji] and kj != back:
                first.append(kj)
                second.append(ji)
                cosines.append(float(directions[kj] @ directions[back]))
    return torch.tensor(first), torch.tensor(second), torch.tensor(cosines, dtype=torch.float64)


def with_triplets(ours: DirectionalInteraction) -> InteractionPPBlock:
    """torch_geometric's block with our weights; it has two matrices where we have their product."""
    functions, features, inner = ours.distance.in_features, ours.own.out_features, ours.inner
    angular = (DEGREE + 1) * functions
    block = InteractionPPBlock(
        hidden_channels=features,
        int_emb_size=inner,
        basis_emb_size=angular,
        num_spherical=DEGREE + 1,
        num_radial=functions,
        num_before_skip=1,
        num_after_skip=2,
        act=torch.nn.functional.silu,
    ).double()
    by_degree = ours.angular.weight.view(DEGREE + 1, inner, functions)
    weights = {
        "lin_rbf1.weight": torch.eye(angular, functions),
        "lin_rbf2.weight": torch.cat([ours.distance.weight, torch.zeros(features, angular - functions)], dim=1),
        "lin_sbf1.weight": torch.eye(angular),
        "lin_sbf2.weight": by_degree.permute(1, 0, 2).reshape(inner, angular),
        "lin_down.weight": ours.down.weight,
        "lin_up.weight": ours.up.weight,
    }
    layers = {"lin_kj": ours.incoming, "lin_ji": ours.own, "lin": ours.skip}
    residuals = {"layers_before_skip.0": ours.before} | {f"layers_after_skip.{n}": r for n, r in enumerate(ours.after)}
    for name, residual in residuals.items():
        layers |= {f"{name}.lin1": residual.first, f"{name}.lin2": residual.second}
    for name, layer in layers.items():
        weights |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    block.load_state_dict(weights)
    return block


@pytest.mark.parametrize("atoms", [rattled_molecule(), rattled_crystal()], ids=["molecule", "crystal"])
def test_an_interaction_is_that_of_torch_geometric_with_explicit_triplets(atoms):
    """In the crystal, two atoms are neighbours through several images: but one of them is left out."""
    model = small_model("dimenetpp", max_degree=DEGREE, features=8, radial_functions=5, cutoff=3.5)
    pairs = measured(atoms, model.encoder)
    ours = model.encoder.interactions[0]
    for parameter in ours.parameters():  # biases begin at zero
        torch.nn.init.normal_(parameter, std=0.4)
    kj, ji, cosines = triplets(pairs)
    legendre = np.stack([eval_legendre(degree, cosines.numpy()) for degree in range(DEGREE + 1)], axis=1)
    radial = pairs.radial.flatten(0, 1)
    messages = torch.randn(*pairs.slots.mask.shape, 8, dtype=torch.float64)
    expected = with_triplets(ours)(
        messages.flatten(0, 1),
        radial,
        (torch.from_numpy(legendre).unsqueeze(2) * radial[kj].unsqueeze(1)).flatten(1),
        kj,
        ji,
    )
    found = ours(messages, solid_harmonics(pairs.directions, DEGREE), pairs).flatten(0, 1)
    real = pairs.slots.mask.reshape(-1)
    assert len(kj) > 100
    torch.testing.assert_close(found[real], expected[real], rtol=1e-11, atol=1e-11)


def test_an_untrained_model_tells_angles_apart():
    """Three atoms of which the outer ones don't see each other: bending changes nothing but the angle."""
    model = small_model("dimenetpp", features=32, radial_functions=20)

    def energy(degrees: float, bond: float = 2.2) -> float:
        turn = np.deg2rad(degrees)
        ends = [[-bond, 0, 0], [-bond * np.cos(turn), bond * np.sin(turn), 0]]
        return float(predict(model, Atoms("OCO", positions=[ends[0], [0, 0, 0], ends[1]])).interaction)

    bent, stretched = energy(150) - energy(180), energy(180, 2.3) - energy(180)
    assert abs(bent) > 5e-4 * abs(stretched)  # with layers as PyTorch makes them it is a tenth of that
