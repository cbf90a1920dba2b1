"""Small files in the layouts of general formats, and helpers that read and compare them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ase.db
import h5py
import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from sources import labelled, metals, molecules

from hydrazero.shards.readers import FieldNames, Frame, ReadSettings, SourceUnits, read_frames
from hydrazero.shards.structure import Structure

BOTH = ("energy", "forces")


def frames(path: Path, name: str | None = None, **more: Any) -> list[Frame]:
    return list(read_frames(path, ReadSettings(format=name, **more)))


def structures(path: Path, name: str | None = None, **more: Any) -> list[Structure]:
    found = frames(path, name, **more)
    assert all(frame.structure is not None for frame in found), [frame.error for frame in found]
    return [frame.structure for frame in found if frame.structure is not None]


def reasons(found: list[Frame]) -> list[str]:
    return ["" if frame.error is None else frame.error.reason for frame in found]


def samples() -> list[Atoms]:
    """Return a molecule, a single atom and a skewed crystal with labels; they differ in size."""
    crystal = metals(1)[0]
    crystal.set_cell(crystal.cell[:] @ [[1.0, 0.1, 0.0], [0.0, 1.0, 0.05], [0.02, 0.0, 1.0]], scale_atoms=True)
    return [molecules(1)[0], labelled(bulk("Cu", "sc", a=2.6)), labelled(crystal)]


def alike(got: list[Structure], wanted: list[Atoms], **tolerance: float) -> None:
    for structure, atoms in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(structure.numbers, atoms.numbers)
        np.testing.assert_array_equal(structure.pbc, atoms.pbc)
        np.testing.assert_allclose(structure.positions, atoms.positions, **tolerance or {"rtol": 0})
        np.testing.assert_allclose(structure.cell, atoms.cell[:], **tolerance or {"rtol": 0})
        np.testing.assert_allclose(structure.forces, atoms.calc.results["forces"], **tolerance or {"rtol": 0})
        assert structure.energy == pytest.approx(atoms.calc.results["energy"], rel=1e-15)


def write_hdf5(path: Path, atoms: list[Atoms], **changes: Any) -> Path:
    sizes = [len(a) for a in atoms]
    columns: dict[str, Any] = {
        "Z": np.concatenate([a.numbers for a in atoms]),
        "R": np.concatenate([a.positions for a in atoms]),
        "F": np.concatenate([a.calc.results["forces"] for a in atoms]),
        "E": np.array([a.calc.results["energy"] for a in atoms]),
        "box": np.array([a.cell[:] for a in atoms]),
        "first": np.concatenate([[0], np.cumsum(sizes)]),
        "sizes": np.array(sizes),
        "name": [f"frame {n}" for n in range(len(atoms))],
        "q": np.arange(len(atoms)) % 2,
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            if column is not None:
                file.create_dataset(f"data/{name}", data=column)
    return path


COLUMNS = {
    "numbers": "data/Z",
    "positions": "data/R",
    "cell": "data/box",
    "energy": "data/E",
    "forces": "data/F",
    "charge": "data/q",
    "name": "data/name",
}


def pymatgen_entry(atoms: Atoms, **more: Any) -> dict[str, Any]:
    fractions = atoms.get_scaled_positions(wrap=False) if atoms.pbc.any() else atoms.positions
    sites = [
        {"species": [{"element": symbol, "occu": 1}], "abc": list(abc), "xyz": list(xyz), "label": symbol}
        for symbol, abc, xyz in zip(atoms.get_chemical_symbols(), fractions, atoms.positions, strict=True)
    ]
    structure: dict[str, Any] = {"charge": None, "sites": sites}
    if atoms.pbc.any():
        structure["lattice"] = {"matrix": atoms.cell[:].tolist()}
    outputs = {
        "energy": atoms.calc.results["energy"],
        "forces": atoms.calc.results["forces"].tolist(),
        "virial_stress": [1, 2, 3, 6, 4, 5],
    }
    return {"structure": structure, "outputs": outputs, "group": "AIMD", **more}


def jarvis_entry(atoms: Atoms, cartesian: bool) -> dict[str, Any]:
    coordinates = atoms.positions if cartesian else atoms.get_scaled_positions(wrap=False)
    return {
        "jid": "1",
        "atoms": {
            "lattice_mat": atoms.cell[:].tolist(),
            "coords": coordinates.tolist(),
            "elements": atoms.get_chemical_symbols(),
            "cartesian": cartesian,
        },
        "total_energy": atoms.calc.results["energy"] / len(atoms),
        "forces": atoms.calc.results["forces"].tolist(),
    }


OUTPUTS = FieldNames(energy="outputs.energy", forces="outputs.forces", stress="outputs.virial_stress")


def write_deepmd(folder: Path, atoms: list[Atoms], **changes: Any) -> Path:
    """Write two sets of frames of one composition."""
    folder.mkdir(parents=True)
    kinds = sorted(set(atoms[0].get_chemical_symbols()), reverse=True)
    (folder / "type_map.raw").write_text("\n".join(changes.pop("kinds", kinds)))
    (folder / "type.raw").write_text("\n".join(str(kinds.index(s)) for s in atoms[0].get_chemical_symbols()))
    half = len(atoms) // 2
    for number, part in enumerate((atoms[:half], atoms[half:])):
        place = folder / f"set.{number:03d}"
        place.mkdir()
        arrays = {
            "coord": [a.positions.reshape(-1) for a in part],
            "box": [a.cell[:].reshape(-1) for a in part],
            "energy": [a.calc.results["energy"] for a in part],
            "force": [a.calc.results["forces"].reshape(-1) for a in part],
            **changes,
        }
        for name, values in arrays.items():
            if values is not None:
                np.save(place / f"{name}.npy", np.array(values))
    return folder


def waters(count: int) -> list[Atoms]:
    found = [atoms for atoms in molecules(4 * count) if len(atoms) == 3]
    for atoms in found:
        atoms.set_cell([5, 6, 7])
        atoms.pbc = True
    return found


def n2p2_text(atoms: Atoms, energy: float) -> str:
    lines = ["begin", "comment made here"]
    lines += [f"lattice {x!r} {y!r} {z!r}" for x, y, z in atoms.cell[:].tolist() if atoms.pbc.all()]
    forces = atoms.calc.results["forces"].tolist()
    for symbol, (x, y, z), (fx, fy, fz) in zip(atoms.symbols, atoms.positions.tolist(), forces, strict=True):
        lines.append(f"atom {x!r} {y!r} {z!r} {symbol} 0.0 0.0 {fx!r} {fy!r} {fz!r}")
    return "\n".join([*lines, f"energy {energy!r}", "charge 1.0", "end", ""])


ATOMIC = SourceUnits(length="Bohr", energy="Hartree", forces="Hartree/Bohr")


def write_lmdb(path: Path, values: list[Any]) -> Path:
    environment = lmdb.open(str(path), subdir=False, map_size=2**24, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(f"{number}".encode(), value if isinstance(value, bytes) else pickle.dumps(value))
        transaction.put(b"length", pickle.dumps(len(values)))
    return path


def tensors(atoms: Atoms, **changes: Any) -> dict[str, Any]:
    return {
        "atomic_numbers": torch.tensor(atoms.numbers),
        "pos": torch.tensor(atoms.positions),
        "cell": torch.tensor(atoms.cell[:])[None],
        "y": atoms.calc.results["energy"],
        "force": torch.tensor(atoms.calc.results["forces"]),
        "sid": 7,
        **changes,
    }


TENSORS = {"numbers": "atomic_numbers", "positions": "pos", "energy": "y", "forces": "force"}


def write_aselmdb(path: Path, atoms: list[Atoms], data: list[dict[str, Any]]) -> Path:
    with ase.db.connect(str(path), type="aselmdb") as database:
        for a, more in zip(atoms, data, strict=True):
            database.write(a, data=more, tag="x")
    return path
