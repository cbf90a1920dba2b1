"""Write SchNetPack's database of training and validation structures and its split file, in its own environment.

    python make_schnetpack_db.py FOLDER ENERGIES

FOLDER holds train.xyz and val.xyz; ENERGIES is a JSON object of energies by element, eV.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ase.io
import numpy as np
from ase.data import atomic_numbers
from schnetpack.data import ASEAtomsData

folder, energies = Path(sys.argv[1]), json.loads(sys.argv[2])
references = np.zeros(100)
for symbol, energy in energies.items():
    references[atomic_numbers[symbol]] = energy
training, validation = (ase.io.read(folder / f"{split}.xyz", ":") for split in ("train", "val"))
dataset = ASEAtomsData.create(
    str(folder / "structures.db"),
    distance_unit="Ang",
    property_unit_dict={"energy": "eV", "forces": "eV/Ang"},
    atomrefs={"energy": references.tolist()},
)
structures = [*training, *validation]
labels = [{"energy": np.array([atoms.get_potential_energy()]), "forces": atoms.get_forces()} for atoms in structures]
dataset.add_systems(property_list=labels, atoms_list=structures)
numbers = np.arange(len(structures))
# spktrain ends with a test; that of one structure takes no time.
np.savez(
    folder / "split.npz", train_idx=numbers[: len(training)], val_idx=numbers[len(training) :], test_idx=numbers[-1:]
)
