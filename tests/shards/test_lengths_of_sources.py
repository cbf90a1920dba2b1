"""Lengths in another unit than that of the settings are said at conversion; right ones are not doubted."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from sources import molecules, write_extxyz

from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.convert.workers import worker_processes


def lengths_said(folder, frames: list[Atoms], unit: str = "Angstrom", workers: int = 1) -> list[str]:
    folder.mkdir(exist_ok=True)
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 * len(atoms))
    source = write_extxyz(folder / "a.extxyz", frames)
    settings = ConvertSettings(units={"length": unit}, labels={"require": ["energy"]})
    with worker_processes(workers) as team:
        manifest = convert([source], "t", folder / "out", settings, workers=team)
    return [text for text in manifest.warnings if text.startswith("the lengths")]


def rattled(atoms: Atoms, count: int = 30, factor: float = 1.0) -> list[Atoms]:
    frames = []
    for seed in range(count):
        frame = atoms.copy()
        frame.rattle(0.03, seed=seed)
        frame.set_cell(frame.cell[:] * factor)
        frame.positions *= factor
        frames.append(frame)
    return frames


@pytest.mark.parametrize("atoms", [molecule("H2O"), bulk("Cu", cubic=True), bulk("NaCl", "rocksalt", a=5.64)])
@pytest.mark.parametrize(
    ("factor", "unit", "said"),
    [
        (1 / units.Bohr, "Angstrom", "the lengths are probably in Bohr, not in Angstrom: in half of the structures"),
        (1.0, "Angstrom", ""),
        (1 / units.Bohr, "Bohr", ""),
        (0.1, "nm", ""),
    ],
)
def test_lengths_in_bohr(tmp_path, atoms, factor, unit, said):
    found = lengths_said(tmp_path, rattled(atoms, factor=factor), unit)
    assert len(found) == bool(said)
    assert all(text.startswith(said) and text.endswith("look at units.length.") for text in found)


def test_lengths_in_angstrom_read_as_bohr_with_any_number_of_workers(tmp_path):
    frames = rattled(molecule("CH3CH2OH"))
    (text,) = lengths_said(tmp_path / "a", frames, "Bohr")
    assert text.startswith("the lengths are probably in Angstrom, not in Bohr:") and "is at most 0.5" in text
    assert lengths_said(tmp_path / "b", frames, "Bohr", workers=2) == [text]


def test_lengths_in_a_much_smaller_unit(tmp_path):
    (text,) = lengths_said(tmp_path, rattled(molecule("CH3CH2OH"), factor=100.0))
    assert text.startswith("the lengths are improbable: in half of the structures, the shortest distance is at least")


def strained() -> list[Atoms]:
    return [bulk("Al", a=4.05 * scale) for scale in np.linspace(0.8, 1.25, 30)]


def scan(cell: float = 0.0) -> list[Atoms]:
    distances = np.linspace(0.7, 6.5, 30)
    return [Atoms("H2", [[0, 0, 0], [0, 0, d]], cell=[cell] * 3, pbc=cell > 0) for d in distances]


@pytest.mark.parametrize(
    "frames",
    [
        strained(),
        scan(),
        scan(20.0),
        rattled(bulk("Ar", cubic=True, a=5.26)),
        [Atoms(symbol) for symbol in ("H", "C", "N", "O", "Cu")],
        [Atoms(symbol, cell=[15.0] * 3, pbc=True) for symbol in ("H", "C", "N", "O", "Cu")],
        [bulk(symbol) for symbol in ("Li", "Na", "K", "Cs", "W", "Au", "Si", "Mg")],
        molecules(40),
    ],
    ids=["strained", "scan", "scan in a cell", "argon", "atoms", "atoms in cells", "metals", "molecules"],
)
def test_right_lengths_are_not_doubted(tmp_path, frames):
    assert lengths_said(tmp_path, frames) == []
