"""Predictions of SchNetPack's best model, which adds the energies of the elements itself."""

from __future__ import annotations

import sys

import torch
from prediction_file import write_predictions
from schnetpack.interfaces import AtomsConverter
from schnetpack.transform import MatScipyNeighborList
from schnetpack.utils import load_model

model = load_model(sys.argv[1], device="cpu").eval()
converter = AtomsConverter(
    neighbor_list=MatScipyNeighborList(cutoff=float(model.representation.cutoff)), dtype=torch.float32
)


def predict(structures):
    found = model(converter(structures))
    return found["energy"].detach().numpy(), found["forces"].detach().numpy()


write_predictions("schnetpack", sum(p.numel() for p in model.parameters()), predict)
