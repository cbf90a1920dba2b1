"""Predictions of MACE, batch by batch as `mace_eval_configs` makes them."""

from __future__ import annotations

import sys

import torch
from mace import data
from mace.tools import AtomicNumberTable, torch_geometric
from prediction_file import write_predictions

# The model file is one that this run wrote; it holds classes, not weights alone.
model = torch.load(sys.argv[1], map_location="cpu", weights_only=False).eval()
torch.set_default_dtype(next(model.parameters()).dtype)
for weights in model.parameters():
    weights.requires_grad = False
table = AtomicNumberTable([int(number) for number in model.atomic_numbers])


def predict(structures):
    configs = [data.config_from_atoms(atoms) for atoms in structures]
    cutoff = float(model.r_max)
    graphs = [
        data.AtomicData.from_config(config, z_table=table, cutoff=cutoff, heads=model.heads) for config in configs
    ]
    (batch,) = torch_geometric.dataloader.DataLoader(dataset=graphs, batch_size=len(graphs), shuffle=False)
    found = model(batch.to_dict(), compute_stress=False)
    return found["energy"].detach().numpy(), found["forces"].detach().numpy()


write_predictions("mace-torch", sum(p.numel() for p in model.parameters()), predict)
