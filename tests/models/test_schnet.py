"""SchNet against the one of torch_geometric, on explicit edges with the same weights."""

from __future__ import annotations

import pytest
import torch
from structures import CUTOFF, batch_of, rattled_crystal, rattled_molecule, small_model, to_structure
from torch_geometric.nn.models.schnet import GaussianSmearing, InteractionBlock

from hydrazero.models.encoders.base import AtomInputs
from hydrazero.models.encoders.schnet import SchNetInteraction
from hydrazero.models.ops.slots import slots_of


def peer_of(block: SchNetInteraction, radial_functions: int) -> InteractionBlock:
    features = block.before.weight.shape[0]
    peer = InteractionBlock(features, radial_functions, features, CUTOFF).double()
    pairs = [
        (peer.mlp[0], block.filter_in),
        (peer.mlp[2], block.filter_out),
        (peer.conv.lin1, block.before),
        (peer.conv.lin2, block.after),
        (peer.lin, block.out),
    ]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    return peer


@pytest.mark.parametrize("atoms", [rattled_molecule(), rattled_crystal()], ids=["molecule", "crystal"])
def test_it_is_that_of_torch_geometric(atoms):
    model = small_model("schnet", radial_basis="gaussian", layers=3)
    batch = batch_of([to_structure(atoms)], extra=(0, 2, 1))
    slots = slots_of(batch)
    pairs = model.encoder.measure(slots, slots.pair_vectors(batch.positions, batch.shifts))
    scalars = torch.randn(len(batch.numbers), 16, dtype=torch.float64)
    found = model.encoder(AtomInputs(numbers=batch.numbers, scalars=scalars), pairs).scalars

    # torch_geometric's edges go from the sender to the receiver; its cutoff function trusts that no edge is longer.
    receiver = slots.row_atom.unsqueeze(1).expand_as(slots.neighbours)[slots.mask]
    edges = torch.stack([slots.neighbours[slots.mask], receiver])
    lengths = pairs.distances[slots.mask]
    functions = GaussianSmearing(0.0, CUTOFF, 8).double()(lengths)
    expected = scalars
    for block in model.encoder.interactions:
        expected = expected + peer_of(block, 8)(expected, edges, lengths, functions)
    assert len(lengths) > 0 and (lengths < CUTOFF).all()
    torch.testing.assert_close(found[: len(atoms)], expected[: len(atoms)], rtol=1e-6, atol=1e-8)
