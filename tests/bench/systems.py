"""The two systems that speeds are measured on; needs ase and numpy alone, for the peer's environment too."""

from __future__ import annotations

from ase import Atoms
from ase.build import bulk, molecule

CUTOFF = 5.0
FEATURES, LAYERS, RADIAL_FUNCTIONS = 128, 3, 20
THREADS = 2


def copper_cells(count: int = 16) -> list[Atoms]:
    """Rattled cells of 32 Cu atoms."""
    cells = []
    for seed in range(count):
        atoms = bulk("Cu", cubic=True) * (2, 2, 2)
        atoms.rattle(0.1, seed=seed)
        cells.append(atoms)
    return cells


def benzenes(count: int = 64) -> list[Atoms]:
    """Rattled benzene molecules."""
    molecules = []
    for seed in range(count):
        atoms = molecule("C6H6")
        atoms.rattle(0.05, seed=seed)
        molecules.append(atoms)
    return molecules


SYSTEMS = {"cu": copper_cells, "benzene": benzenes}
