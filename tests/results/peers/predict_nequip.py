"""Predictions of a checkpoint of NequIP, whose averaged weights are taken, without compilation."""

from __future__ import annotations

import sys

import torch
from nequip.data import AtomicDataDict, from_ase
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
from nequip.model import ModelFromCheckpoint
from nequip.utils.global_state import set_global_state
from prediction_file import write_predictions

set_global_state()
models = ModelFromCheckpoint(sys.argv[1], compile_mode="eager")
model = models["sole_model"] if isinstance(models, torch.nn.ModuleDict) else models
model.eval()
transforms = [
    ChemicalSpeciesToAtomTypeMapper(model_type_names=list(model.type_names)),
    NeighborListTransform(r_max=float(model.metadata["r_max"])),
]


def prepared(atoms):
    item = from_ase(atoms, exclude_keys=["energy", "forces"])
    for transform in transforms:
        item = transform(item)
    return item


def predict(structures):
    batch = AtomicDataDict.batched_from_list([prepared(atoms) for atoms in structures])
    found = model(batch)
    energies, forces = found[AtomicDataDict.TOTAL_ENERGY_KEY], found[AtomicDataDict.FORCE_KEY]
    return energies.detach().numpy(), forces.detach().numpy()


write_predictions("nequip", sum(p.numel() for p in model.parameters()), predict)
