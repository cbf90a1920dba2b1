"""Small source files of molecules and metal cells, made by tests and labelled by ASE's EMT calculator."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings


def labelled(atoms: Atoms) -> Atoms:
    """Label atoms with EMT's energy and forces, and crystals also with its stress; return them."""
    copy = atoms.copy()
    copy.calc = EMT()
    results = {"energy": copy.get_potential_energy(), "forces": copy.get_forces()}
    if atoms.pbc.all():
        results["stress"] = copy.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def molecules(count: int, seed: int = 0) -> list[Atoms]:
    frames = []
    for number in range(count):
        atoms = molecule(("H2O", "CH4", "CH3OH", "NH3")[number % 4])
        atoms.rattle(0.08, seed=1000 * seed + number)
        frames.append(labelled(atoms))
    return frames


def metals(count: int, seed: int = 0) -> list[Atoms]:
    frames = []
    generator = np.random.default_rng(seed)
    for number in range(count):
        atoms = bulk("Cu", cubic=True) * (1, 1, 1 + number % 2)
        atoms.set_chemical_symbols([str(s) for s in generator.choice(["Cu", "Au"], len(atoms))])
        atoms.set_cell(atoms.cell[:] * 1.06, scale_atoms=True)
        atoms.rattle(0.1, seed=1000 * seed + number)
        frames.append(labelled(atoms))
    return frames


def write_extxyz(path: Path, frames: list[Atoms]) -> Path:
    ase.io.write(path, frames, format="extxyz")
    return path


def make_shards(folder: Path, task: str, frames: list[Atoms], **settings: object) -> Path:
    """Convert frames to shards in `folder`/TASK; return that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_extxyz(folder / f"{task}.extxyz", frames)
    convert([source], task, folder / task, ConvertSettings(**settings))  # type: ignore[arg-type]
    return folder / task
