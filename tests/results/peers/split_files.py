"""Write the splits of a folder of shards as extended XYZ, which the other tools read.

    python -m results.peers.split_files SHARDS OUT

Writes OUT/train.xyz, OUT/val.xyz and OUT/test.xyz: positions and cells in Å, energies in eV (`energy`), forces in eV/Å
(`forces`), and the name of each structure's source (`source_id`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from hydrazero.shards.manifest import SPLITS
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.structure import Structure


def write_split_files(shards: Path, out: Path) -> None:
    """Write the files of all splits into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        ase.io.write(out / f"{split}.xyz", split_structures(shards, split), format="extxyz")


def split_structures(shards: Path, split: str) -> list[Atoms]:
    """Return the structures of a split that have both energy and forces, in the order of the shards."""
    reader = BlockReader(str(shards), split)
    blocks = (reader.read(number) for number in range(len(reader)))
    structures = [block.structure(index) for block in blocks for index in range(len(block))]
    return [atoms_of(each) for each in structures if each.energy is not None and each.forces is not None]


def atoms_of(structure: Structure) -> Atoms:
    """Return a structure with its labels and source."""
    cell = structure.cell if structure.pbc.any() else None
    atoms = Atoms(numbers=structure.numbers, positions=structure.positions, cell=cell, pbc=structure.pbc)
    atoms.info["source_id"] = structure.source_id
    atoms.calc = SinglePointCalculator(atoms, energy=structure.energy, forces=structure.forces)
    return atoms


def energies_by_element(structures: list[Atoms]) -> dict[str, float]:
    """Return an energy in eV for each element, whose sums fit the energies best (the smallest ones, if many do)."""
    elements = sorted({symbol for atoms in structures for symbol in atoms.symbols})
    counts = np.array([[atoms.symbols.count(symbol) for symbol in elements] for atoms in structures], dtype=float)
    energies = np.array([atoms.get_potential_energy() for atoms in structures])
    fitted = np.linalg.lstsq(counts, energies, rcond=None)[0]
    return dict(zip(elements, fitted.tolist(), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write_split_files(options.shards, options.out)
