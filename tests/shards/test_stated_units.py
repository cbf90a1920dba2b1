"""Units, cells and charges that files themselves state: used, and compared with the settings."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ase.db
import h5py
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from format_files import (
    ATOMIC,
    COLUMNS,
    TENSORS,
    frames,
    n2p2_text,
    reasons,
    samples,
    structures,
    tensors,
    write_aselmdb,
    write_hdf5,
    write_lmdb,
)

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers import FieldNames, SourceUnits
from hydrazero.shards.targets import TargetSection

KCAL = 0.0433641043  # eV
HARTREE, BOHR = 27.211386245, 0.529177210903  # eV, Å

# npz


def sgdml(path: Path, **changes: Any) -> Path:
    arrays = {
        "z": np.array([8, 1]),
        "R": np.array([[[0, 0, 0], [0, 0, 1 + 0.01 * n]] for n in range(3)]),
        "E": np.full((3, 1), -47900.0),
        "F": np.full((3, 2, 3), 2.0),
        "e_unit": "kcal/mol",
        "r_unit": "Ang",
        **changes,
    }
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_units_of_an_sgdml_archive(tmp_path):
    first = structures(sgdml(tmp_path / "a.npz"))[0]
    assert first.energy == pytest.approx(-2077.1406, abs=1e-3)
    assert first.forces[0, 0] == pytest.approx(2 * KCAL) and first.positions[1, 2] == 1 and not first.pbc.any()
    first = structures(sgdml(tmp_path / "b.npz", e_unit=b"Hartree", r_unit=np.array(["bohr"])))[0]
    assert first.energy == pytest.approx(-47900 * HARTREE)
    assert first.forces[0, 0] == pytest.approx(2 * HARTREE / BOHR) and first.positions[1, 2] == pytest.approx(BOHR)
    first = structures(sgdml(tmp_path / "c.npz", e_unit="au", r_unit="au"))[0]
    assert first.forces[0, 0] == pytest.approx(2 * HARTREE / BOHR)
    assert structures(sgdml(tmp_path / "d.npz", e_unit=None, r_unit=None))[0].energy == -47900


def test_the_lattice_of_an_sgdml_archive_has_vectors_as_columns(tmp_path):
    vectors = np.array([[5.0, 0, 0], [2.5, 4.0, 0], [0, 0.5, 6.0]])
    path = sgdml(tmp_path / "a.npz", lattice=vectors.T, r_unit="nm")
    read = structures(path, units=SourceUnits(energy="kcal/mol"))
    for structure in read:
        np.testing.assert_allclose(structure.cell, 10 * vectors)
        assert structure.pbc.all()


def test_settings_that_contradict_an_archive(tmp_path):
    path = sgdml(tmp_path / "a.npz")
    for same in ("kcal/mol", "kcal mol^-1"):
        assert structures(path, units=SourceUnits(energy=same))[0].energy == pytest.approx(-47900 * KCAL)
    with pytest.raises(SourceError, match=r"units\.energy is 'Hartree', but the file states 'kcal/mol' .*'e_unit'"):
        frames(path, units=SourceUnits(energy="Hartree"))
    with pytest.raises(SourceError, match=r"units\.forces is 'eV/Angstrom', but the file states 'kcal/mol/Ang'"):
        frames(path, units=SourceUnits(forces="eV/Angstrom"))
    gradients = structures(path, units=SourceUnits(forces="-kcal/mol/Angstrom"))
    assert gradients[0].forces[0, 0] == pytest.approx(-2 * KCAL)  # a sign is no part of the unit that a file states
    with pytest.raises(SourceError, match=r"states the unit 'erg' for the energy .* say what it is by units\.energy"):
        frames(sgdml(tmp_path / "b.npz", e_unit="erg"))
    read = structures(sgdml(tmp_path / "b.npz", e_unit="erg"), units=SourceUnits(energy="eV", forces="eV/Angstrom"))
    assert read[0].energy == -47900


# HDF5


def write_hdf5_with_units(path: Path, **units_of: str) -> Path:
    write_hdf5(path, samples())
    with h5py.File(path, "a") as file:
        for name, unit in units_of.items():
            file[f"data/{name}"].attrs["units"] = unit
    return path


PTR = {**COLUMNS, "ptr": "data/first"}


def test_attributes_of_datasets(tmp_path):
    path = write_hdf5_with_units(tmp_path / "a.h5", R="bohr", box="bohr", E="hartree", F="hartree/bohr")
    atoms = samples()[2]
    read = structures(path, columns=PTR)[2]
    np.testing.assert_allclose(read.positions, atoms.positions * BOHR, rtol=1e-7)
    np.testing.assert_allclose(read.cell, atoms.cell[:] * BOHR, rtol=1e-7)
    np.testing.assert_allclose(read.forces, atoms.calc.results["forces"] * HARTREE / BOHR, rtol=1e-7)
    assert read.energy == pytest.approx(atoms.calc.results["energy"] * HARTREE)
    with pytest.raises(SourceError, match=r"units\.length is 'Angstrom', but the file states 'bohr' .*data/R"):
        frames(path, columns=PTR, units=SourceUnits(length="Angstrom"))
    path = write_hdf5_with_units(tmp_path / "b.h5", R="bohr", box="nm")
    with pytest.raises(SourceError, match=r"two units, 'bohr' .* and 'nm'"):
        frames(path, columns=PTR)
    path = write_hdf5_with_units(tmp_path / "c.h5", E="Hartree")
    with pytest.raises(SourceError, match=r"'Hartree' for the energy and none for the forces; .*units\.forces"):
        frames(path, columns=PTR)
    assert structures(path, columns=PTR, units=SourceUnits(forces="Hartree/Angstrom"))


def test_energies_that_are_stated_to_be_per_atom(tmp_path):
    path = write_hdf5_with_units(tmp_path / "a.h5", E="meV/atom")
    with pytest.raises(SourceError, match=r"states 'meV/atom' for the energy .*; set energy_per_atom = true"):
        frames(path, columns=PTR)
    atoms = samples()[2]
    units = SourceUnits(forces="eV/Angstrom")
    read = structures(path, columns=PTR, units=units, energy_per_atom=True)[2]
    assert read.energy == pytest.approx(atoms.calc.results["energy"] * len(atoms) / 1000)


def test_attributes_of_a_file(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", samples())
    with h5py.File(path, "a") as file:
        file.attrs.update({"energy_unit": "meV", "force_unit": "meV/angstrom", "stress_unit": "bar", "pbc": "F F F"})
    read = structures(path, columns=PTR)[2]
    assert read.energy == pytest.approx(samples()[2].calc.results["energy"] / 1000)
    assert not read.pbc.any() and read.cell.any()
    assert structures(path, columns=PTR, units=SourceUnits(stress="GPa"))  # the file has no stress


def test_attributes_in_groups(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("water")
        group["numbers"], group["positions"] = [8, 1], [[[0, 0, 0], [0, 0, 2.0]]] * 2
        group["energy"], group["forces"] = [-1.0, -2.0], np.ones((2, 2, 3))
        group.attrs["charge"] = -1
        for name, unit in {"positions": "bohr", "energy": "hartree", "forces": "hartree/bohr"}.items():
            group[name].attrs["units"] = unit
    read = structures(tmp_path / "a.h5", "hdf5_groups", units=SourceUnits(forces="-Hartree/Bohr"))
    assert read[1].energy == pytest.approx(-2 * HARTREE) and read[1].positions[1, 2] == pytest.approx(2 * BOHR)
    assert read[1].forces[0, 0] == pytest.approx(-HARTREE / BOHR) and read[0].charge == -1
    with pytest.raises(SourceError, match=r"units\.energy is 'eV', but the file states 'hartree'"):
        frames(tmp_path / "a.h5", "hdf5_groups", units=SourceUnits(energy="eV"))


def test_a_target_in_another_unit_than_the_file_states(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", samples(), gap=np.arange(3.0))
    with h5py.File(path, "a") as file:
        file["data/gap"].attrs["unit"] = "Hartree"
    columns = {**PTR, "gap": "data/gap"}
    with pytest.raises(SourceError, match=r"'gap' is 'eV', but the file states 'Hartree' .* targets\.gap\.unit"):
        frames(path, columns=columns, targets={"gap": TargetSection(field="gap", unit="eV")})
    with pytest.raises(SourceError, match=r"target 'gap' is ''"):
        frames(path, columns=columns, targets={"gap": TargetSection(field="gap")})
    read = structures(path, columns=columns, targets={"gap": TargetSection(field="gap", unit="Hartree")})
    assert read[1].targets["gap"] == pytest.approx(HARTREE)


# Databases


def schnetpack(path: Path, **metadata: Any) -> Path:
    with ase.db.connect(path) as database:
        data = {"energy": np.array([-2.0]), "forces": np.ones((2, 3)), "total_charge": 1, "spin_multiplicity": 2}
        database.write(Atoms("OH", [[0, 0, 0], [0, 0, 1]]), data=data)
        database.metadata = {"atomrefs": {}, **metadata}
    return path


def test_metadata_of_schnetpack(tmp_path):
    units = {"energy": "Hartree", "forces": "Hartree/Ang"}
    path = schnetpack(tmp_path / "a.db", _property_unit_dict=units, _distance_unit="Bohr")
    (read,) = structures(path)
    assert read.energy == pytest.approx(-2 * HARTREE) and read.forces[0, 0] == pytest.approx(HARTREE)
    assert read.positions[1, 2] == pytest.approx(BOHR) and (read.charge, read.multiplicity) == (1, 2)
    with pytest.raises(SourceError, match=r"units\.energy is 'kcal/mol', but the file states 'Hartree'.*unit_dict"):
        frames(path, units=SourceUnits(energy="kcal/mol"))
    (read,) = structures(schnetpack(tmp_path / "b.db", _property_unit_dict={"energy": 1.0}, _distance_unit="Ang"))
    assert read.energy == -2
    (read,) = structures(path, fields=FieldNames(charge="", multiplicity=""))
    assert (read.charge, read.multiplicity) == (0, 0)


def test_charge_and_spin_of_fairchem(tmp_path):
    data = [{"charge": -1, "spin": 2}, {"charge": 0, "spin": 0}, {"charge": 0, "spin": 1, "multiplicity": 3}]
    read = structures(write_aselmdb(tmp_path / "a.aselmdb", samples(), data))
    assert [(s.charge, s.multiplicity) for s in read] == [(-1, 2), (0, 0), (0, 3)]


def test_the_charge_line_of_n2p2(tmp_path):
    path = tmp_path / "input.data"
    path.write_text("".join(n2p2_text(a, -1.0) for a in samples()))
    assert [s.charge for s in structures(path, "n2p2", units=ATOMIC)] == [1, 1, 1]
    assert [s.charge for s in structures(path, "n2p2", units=ATOMIC, fields=FieldNames(charge=""))] == [0, 0, 0]
    path.write_text(n2p2_text(samples()[0], -1.0).replace("charge 1.0", "charge 0.4"))
    assert reasons(frames(path, "n2p2", units=ATOMIC)) == ["bad_charge"]


def test_metadata_of_an_lmdb_of_pickles(tmp_path):
    path = write_lmdb(tmp_path / "a.lmdb", [tensors(samples()[2], total_charge=2)])
    metadata = pickle.dumps({"_distance_unit": "Bohr", "_property_unit_dict": {"energy": "Hartree"}})
    with lmdb.open(str(path), subdir=False, lock=False) as file, file.begin(write=True) as transaction:
        transaction.put(b"_metadata", metadata)
    (read,) = structures(path, columns=TENSORS, trust_pickle=True)
    assert read.energy == pytest.approx(samples()[2].calc.results["energy"] * HARTREE) and read.charge == 2


# Parquet


def test_metadata_of_parquet(tmp_path):
    table = pa.table(
        {
            "numbers": [[8, 1]],
            "positions": [[[0.0, 0, 0], [0, 0, 1]]],
            "energy": pa.array([-2.0]),
        }
    )
    field = table.schema.field("energy").with_metadata({"units": "Hartree"})
    schema = table.schema.set(2, field).with_metadata({"length_unit": "bohr"})
    pq.write_table(table.cast(schema), tmp_path / "a.parquet")
    (read,) = structures(tmp_path / "a.parquet")
    assert read.energy == pytest.approx(-2 * HARTREE) and read.positions[1, 2] == pytest.approx(BOHR)
    with pytest.raises(SourceError, match=r"units\.energy is 'eV', but the file states 'Hartree'"):
        frames(tmp_path / "a.parquet", units=SourceUnits(energy="eV"))
