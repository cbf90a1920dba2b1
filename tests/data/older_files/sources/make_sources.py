"""Write the labelled sources of this folder: ASE's EMT labels, further quantities are random numbers."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

HERE = Path(__file__).parent


def labelled(atoms: Atoms) -> Atoms:
    """Label with EMT, with the stress where the cell is periodic; numbers are rounded, so that files are short."""
    atoms.positions = np.round(atoms.positions, 4)
    copy = atoms.copy()
    copy.calc = EMT()
    results = {"energy": round(copy.get_potential_energy(), 6), "forces": np.round(copy.get_forces(), 5)}
    if atoms.pbc.all():
        results["stress"] = np.round(copy.get_stress(), 7)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def molecules(count: int) -> list[Atoms]:
    """Molecules in Hartree and Bohr, every fourth an ion; every third has no gap, every fifth no charges."""
    generator, frames = np.random.default_rng(0), []
    for number in range(count):
        atoms = molecule(("H2O", "CH4", "CH3OH", "NH3")[number % 4])
        atoms.rattle(0.08, seed=number)
        results = labelled(atoms).calc.results
        atoms.calc = None
        atoms.info["E"] = round(results["energy"] / units.Hartree, 8)
        atoms.arrays["F"] = np.round(results["forces"] * units.Bohr / units.Hartree, 6)
        if number % 4 == 0:
            atoms.info |= {"q": 1, "mult": 2}
        atoms.info["alpha"] = round(5.0 * len(atoms) + generator.normal(), 4)
        atoms.info["mu"] = np.round(generator.normal(size=3), 4)
        if number % 3:
            atoms.info["homo_lumo"] = round(0.3 + 0.01 * generator.normal(), 5)
        if number % 5:
            atoms.arrays["mulliken"] = np.round(generator.normal(size=len(atoms)), 3)
        frames.append(atoms)
    return frames


def metals(count: int) -> list[Atoms]:
    """Cells of copper and gold, 2 or 4 atoms."""
    generator, frames = np.random.default_rng(1), []
    for number in range(count):
        atoms = bulk("Cu", cubic=True) if number % 2 else bulk("Cu") * (1, 1, 2)
        atoms.set_chemical_symbols([str(symbol) for symbol in generator.choice(["Cu", "Au"], len(atoms))])
        atoms.set_cell(np.round(atoms.cell[:] * 1.06, 4), scale_atoms=True)
        atoms.rattle(0.1, seed=100 + number)
        frames.append(labelled(atoms))
    return frames


def waters(count: int) -> dict[str, np.ndarray]:
    """Waters as arrays of all atoms in a row, in kcal/mol."""
    frames = []
    for number in range(count):
        atoms = molecule("H2O")
        atoms.rattle(0.1, seed=200 + number)
        frames.append(labelled(atoms))
    kcal = units.kcal / units.mol
    return {
        "atomic_numbers": np.concatenate([atoms.numbers for atoms in frames]),
        "coordinates": np.concatenate([atoms.positions for atoms in frames]),
        "total_energy": np.array([atoms.calc.results["energy"] / kcal for atoms in frames]),
        "force": np.concatenate([atoms.calc.results["forces"] / kcal for atoms in frames]),
        "sizes": np.array([len(atoms) for atoms in frames]),
    }


def probes() -> list[Atoms]:
    """Structures to predict: molecules, two of them charged, and crystals."""
    names = [("H2O", 0, 1), ("CH4", 0, 1), ("CH3OH", 1, 2), ("NH3", -1, 2)]
    frames = []
    for number, (name, charge, multiplicity) in enumerate(names):
        atoms = molecule(name)
        atoms.rattle(0.1, seed=300 + number)
        atoms.info |= {"charge": charge, "multiplicity": multiplicity}
        frames.append(atoms)
    for number, symbols in enumerate((["Cu"] * 4, ["Cu", "Au", "Au", "Cu"])):
        atoms = bulk("Cu", cubic=True)
        atoms.set_chemical_symbols(symbols)
        atoms.set_cell(atoms.cell[:] @ (np.eye(3) * 1.05 + [[0, 0.03, 0], [0, 0, 0], [0.01, 0, 0]]), scale_atoms=True)
        atoms.rattle(0.1, seed=400 + number)
        frames.append(atoms)
    for atoms in frames:
        atoms.positions, atoms.cell = np.round(atoms.positions, 5), np.round(atoms.cell[:], 5)
    return frames


if __name__ == "__main__":
    ase.io.write(HERE / "qm.extxyz", molecules(40), format="extxyz")
    ase.io.write(HERE / "metals.extxyz", metals(30), format="extxyz")
    np.savez_compressed(HERE / "water.npz", **waters(30))
    ase.io.write(HERE / "probes.extxyz", probes(), format="extxyz")
