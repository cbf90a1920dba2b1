"""The systems on which speeds are measured; only ase and numpy are needed, as in the peers' environments."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

CUTOFF = 5.0
FEATURES, LAYERS, RADIAL_FUNCTIONS = 128, 3, 20
THREADS = 2


def copper_cells(count: int = 16) -> list[Atoms]:
    """Return rattled cells of 32 Cu atoms."""
    cells = []
    for seed in range(count):
        atoms = bulk("Cu", cubic=True) * (2, 2, 2)
        atoms.rattle(0.1, seed=seed)
        cells.append(atoms)
    return cells


def benzenes(count: int = 64) -> list[Atoms]:
    """Return rattled benzene molecules."""
    molecules = []
    for seed in range(count):
        atoms = molecule("C6H6")
        atoms.rattle(0.05, seed=seed)
        molecules.append(atoms)
    return molecules


def hexanes(count: int = 96) -> list[Atoms]:
    """Return rattled C6H14 molecules of 20 atoms."""
    return _rattled_chains("C6H14", 6, [(-0.9, -0.19, 0.0), (7.25, 0.19, 0.0)], count)


def octanols(count: int = 200) -> list[Atoms]:
    """Return rattled C8H17OH molecules of 27 atoms."""
    return _rattled_chains("C8H16HOH", 8, [(-0.9, -0.19, 0.0), (10.15, 0.34, 0.0), (10.9, -0.25, 0.0)], count)


def _rattled_chains(formula: str, length: int, ends: list[tuple[float, float, float]], count: int) -> list[Atoms]:
    """Return molecules with a chain of CH2 groups in a zigzag, and further atoms at its ends."""
    carbons = [(1.27 * n, 0.44 * (-1) ** n, 0.0) for n in range(length)]
    hydrogens = [(x, y + np.sign(y) * 0.63, z) for x, y, _ in carbons for z in (0.89, -0.89)]
    plain = Atoms(formula, positions=[*carbons, *hydrogens, *ends])
    molecules = []
    for seed in range(count):
        atoms = plain.copy()
        atoms.rattle(0.05, seed=seed)
        molecules.append(atoms)
    return molecules


SCREENED = {"molecules": hexanes, "metals": copper_cells}
"""The systems of the screening benchmark: 20-atom molecules and 32-atom metal cells."""
SYSTEMS = {"cu": copper_cells, "benzene": benzenes}
