"""Structures of the demo: rattled molecules of ASE's g2 and s22 collections, alloy and silicon cells."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.collections import g2, s22

MOST_ATOMS = 24
"""Maximum number of atoms of a molecule."""
LARGEST_RATTLE = 0.1
"""Maximum displacement of the atoms of a molecule (root mean square along each axis), Å."""
FCC_LATTICE = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}
"""Lattice constants of the metals for which ASE's EMT has parameters, Å."""
SILICON_LATTICE = 5.43
"""Lattice constant of silicon, Å."""
SMALL_MOLECULES = ("H2O", "NH3", "CH4", "HCN", "H2CO", "CH3OH", "C2H2", "C2H4", "CO2", "N2H4", "H2O2")
"""Closed-shell molecules of at most six atoms, which Hartree-Fock computes in a fraction of a second."""


def molecule_names() -> list[str]:
    """Return the sorted names of the collections' closed-shell molecules with 2 to MOST_ATOMS atoms."""
    names = []
    for collection in (g2, s22):
        for name in collection.names:
            atoms = collection[name]
            # The demo's methods are for closed shells. Radicals and triplets have moments in the collections.
            closed_shell = int(atoms.numbers.sum()) % 2 == 0 and not atoms.get_initial_magnetic_moments().any()
            if 2 <= len(atoms) <= MOST_ATOMS and closed_shell:
                names.append(name)
    return sorted(set(names))


def parent_molecule(name: str) -> Atoms:
    """Return a molecule of the collections in its original geometry."""
    collection = g2 if name in g2.names else s22
    found: Atoms = collection[name]
    return found


def rattled_molecule(names: list[str], generator: np.random.Generator) -> Atoms:
    """Draw a molecule and displace its atoms by 0.02 to 0.1 Å (root mean square along each axis)."""
    name = str(generator.choice(names))
    parent = parent_molecule(name)
    atoms = Atoms(numbers=parent.numbers, positions=parent.positions)
    amplitude = generator.uniform(0.02, LARGEST_RATTLE)
    atoms.positions += amplitude * generator.standard_normal(atoms.positions.shape)
    atoms.info["system"] = name
    return atoms


def alloy_cell(generator: np.random.Generator) -> Atoms:
    """Draw a rattled and strained fcc cell of 4 to 32 atoms with one to three metals on random sites."""
    metals = generator.choice(sorted(FCC_LATTICE), size=int(generator.integers(1, 4)), replace=False)
    repeats = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2))[int(generator.integers(4))]
    atoms = bulk("Cu", "fcc", a=1.0, cubic=True) * repeats
    atoms.set_chemical_symbols([str(symbol) for symbol in generator.choice(metals, size=len(atoms))])
    # Vegard's rule gives the lattice constant of the alloy.
    lattice = float(np.mean([FCC_LATTICE[symbol] for symbol in atoms.get_chemical_symbols()]))
    return _strained_and_rattled(atoms, lattice, 0.12, "-".join(sorted({str(m) for m in metals})), generator)


def silicon_cell(generator: np.random.Generator) -> Atoms:
    """Draw a rattled and strained diamond cell of 8 or 16 silicon atoms."""
    repeats = ((1, 1, 1), (2, 1, 1))[int(generator.integers(2))]
    atoms = bulk("Si", "diamond", a=1.0, cubic=True) * repeats
    return _strained_and_rattled(atoms, SILICON_LATTICE, 0.15, "Si", generator)


def _strained_and_rattled(
    atoms: Atoms, lattice: float, amplitude: float, system: str, generator: np.random.Generator
) -> Atoms:
    strain = np.eye(3) + 0.03 * generator.standard_normal((3, 3))
    atoms.set_cell(lattice * atoms.cell[:] @ (0.5 * (strain + strain.T)), scale_atoms=True)
    atoms.positions += generator.uniform(0.02, amplitude) * generator.standard_normal(atoms.positions.shape)
    atoms.info["system"] = system
    return atoms


def screening_structures(count: int, seed: int) -> Iterator[Atoms]:
    """Draw unlabelled structures for screening, two rattled molecules for each alloy cell."""
    generator = np.random.default_rng((seed, 99))
    names = molecule_names()
    for number in range(count):
        yield alloy_cell(generator) if number % 3 == 2 else rattled_molecule(names, generator)
