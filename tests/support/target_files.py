"""Small labelled source files of many formats with targets of all four shapes, some of them missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.db
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from format_files import pymatgen_entry, tensors, write_aselmdb, write_lmdb
from sources import molecules, write_extxyz

COUNT = 24
TARGETS = """
[targets.gap]
field = "PREFIXgap"
unit = "Hartree"
[targets.dipole]
field = "PREFIXmu"
kind = "vector"
unit = "Debye"
[targets.charges]
field = "PREFIXq"
of = "atom"
unit = "e"
[targets.atom_dipoles]
field = "PREFIXmu_i"
of = "atom"
kind = "vector"
unit = "e*Bohr"
"""
NAMES = {"gap": "gap", "mu": "dipole", "q": "charges", "mu_i": "atom_dipoles"}
FACTORS = {"gap": units.Hartree, "mu": units.Debye, "q": 1.0, "mu_i": units.Bohr}

Sample = tuple[Atoms, dict[str, Any]]


def samples() -> list[Sample]:
    """Return molecules whose energy is their number, with quantities.

    Every third molecule lacks the gap, and every fifth the charges.
    """
    generator = np.random.default_rng(0)
    found = []
    for number, atoms in enumerate(molecules(COUNT)):
        size = (len(atoms),)
        atoms.calc = SinglePointCalculator(atoms, energy=float(number), forces=generator.normal(size=(*size, 3)))
        values = {"gap": 0.3 + 0.01 * generator.normal(), "mu": generator.normal(size=3)}
        values |= {"q": generator.normal(size=size), "mu_i": generator.normal(size=(*size, 3))}
        values = {name: np.round(value, 6) for name, value in values.items()}  # extended XYZ has no more digits
        missing = {"gap": number % 3 == 0, "q": number % 5 == 0}
        found.append((atoms, {name: value for name, value in values.items() if not missing.get(name)}))
    return found


def sizes_of(atoms: Atoms) -> dict[str, tuple[int, ...]]:
    return {"gap": (), "mu": (3,), "q": (len(atoms),), "mu_i": (len(atoms), 3)}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in values.items()}


def extxyz(folder: Path) -> Path:
    frames = []
    for atoms, values in samples():
        for name, value in values.items():
            (atoms.arrays if name in ("q", "mu_i") else atoms.info)[name] = value
        frames.append(atoms)
    return write_extxyz(folder / "a.extxyz", frames)


def database(folder: Path) -> Path:
    with ase.db.connect(str(folder / "a.db")) as written:
        for atoms, values in samples():
            written.write(atoms, data=values)
    return folder / "a.db"


def aselmdb(folder: Path) -> Path:
    pytest.importorskip("ase_db_backends")
    atoms, values = zip(*samples(), strict=True)
    return write_aselmdb(folder / "a.aselmdb", list(atoms), list(values))


def ragged() -> dict[str, Any]:
    """Return arrays of the atoms of all structures one after another, NaN where a structure lacks a quantity."""
    atoms = [a for a, _ in samples()]
    arrays: dict[str, Any] = {
        "numbers": np.concatenate([a.numbers for a in atoms]),
        "positions": np.concatenate([a.positions for a in atoms]),
        "forces": np.concatenate([a.calc.results["forces"] for a in atoms]),
        "energy": np.array([a.calc.results["energy"] for a in atoms]),
        "n_atoms": np.array([len(a) for a in atoms]),
    }
    for name in NAMES:
        rows = [values.get(name, np.full(sizes_of(a)[name], np.nan)) for a, values in samples()]
        arrays[name] = np.concatenate(rows) if name in ("q", "mu_i") else np.array(rows)
    return arrays


def hdf5(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        for name, values in ragged().items():
            file[name] = values
    return folder / "a.h5"


def npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", **ragged())
    return folder / "a.npz"


def hdf5_groups(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        for number, (atoms, values) in enumerate(samples()):
            parts = {"numbers": atoms.numbers, "positions": atoms.positions, **atoms.calc.results, **values}
            for name, value in parts.items():
                file[f"g{number}/{name}"] = value
    return folder / "a.h5"


def parquet(folder: Path) -> Path:
    """Write the vectors of the atoms of each structure as one flat list, null where they are missing."""
    rows = []
    for atoms, values in samples():
        flat = {**values, "mu_i": np.ravel(values["mu_i"])}
        parts = {"numbers": atoms.numbers, "positions": atoms.positions, **atoms.calc.results, **flat}
        rows.append({**dict.fromkeys(NAMES), **plain(parts)})
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def pymatgen(folder: Path) -> Path:
    entries = [
        pymatgen_entry(a, computed={**dict.fromkeys(NAMES), **plain(values)}) | {"group": "x"}
        for a, values in samples()
    ]
    (folder / "a.json").write_text(json.dumps(entries))
    return folder / "a.json"


def lmdb(folder: Path) -> Path:
    return write_lmdb(folder / "a.lmdb", [tensors(a) | dict(map(_tensor, values.items())) for a, values in samples()])


def _tensor(item: tuple[str, Any]) -> tuple[str, torch.Tensor]:
    return item[0], torch.tensor(item[1])


READING = {
    hdf5: '[columns]\nnumbers = "numbers"',
    npz: '[columns]\nnumbers = "numbers"',
    hdf5_groups: 'format = "hdf5_groups"',
    pymatgen: 'format = "pymatgen"\n[fields]\nenergy = "outputs.energy"\nforces = "outputs.forces"',
    lmdb: '[columns]\nnumbers = "atomic_numbers"\npositions = "pos"\nenergy = "y"\nforces = "force"',
}
