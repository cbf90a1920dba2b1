"""Readers of columns, JSON and compressed files: values and units by hand, bad entries, damaged files, folders."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from format_files import (
    BOTH,
    COLUMNS,
    OUTPUTS,
    alike,
    frames,
    jarvis_entry,
    n2p2_text,
    pymatgen_entry,
    reasons,
    samples,
    structures,
    waters,
    write_aselmdb,
    write_deepmd,
    write_hdf5,
)
from sources import metals, molecules, write_extxyz

from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import ConfigError, HydrazeroError, SourceError, StructureError
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.readers import FieldNames, ReadSettings, SourceUnits, expand_sources, read_frames

SHEARED = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])
"""xx yy zz yz xz xy = 1 2 3 4 5 6."""


# Stress, energy per atom


@pytest.mark.parametrize(
    ("order", "six"), [("xx yy zz yz xz xy", [1, 2, 3, 4, 5, 6]), ("xx yy zz xy yz zx", [1, 2, 3, 6, 4, 5])]
)
def test_the_order_of_six_numbers(tmp_path, order, six):
    atoms = Atoms("Cu", cell=[2, 2, 2], pbc=True, info={"energy": -1.0, "pressure": six})
    path = write_extxyz(tmp_path / "a.xyz", [atoms])
    settings = tmp_path / "s.toml"
    settings.write_text(
        f'stress_order = "{order}"\n[labels]\nrequire = ["energy"]\n[fields]\nstress = "pressure"\n'
        '[units]\nstress = "-kbar"\n'
    )
    (structure,) = [frame.structure for frame in read_frames(path, load_convert_settings(settings).read_settings())]
    kbar = 1e8 / 1.602176634e-19 * 1e-30  # eV/Å^3
    np.testing.assert_allclose(structure.stress, -SHEARED * kbar, rtol=1e-7)


@pytest.mark.parametrize("order", ["xx yy zz", "xx yy zz yz xz yx xx", "xx yy zz yz xz zx", "", "1 2 3 4 5 6"])
def test_a_wrong_order_is_refused(tmp_path, order):
    settings = tmp_path / "s.toml"
    settings.write_text(f'stress_order = "{order}"\n')
    with pytest.raises(ConfigError, match=rf"stress_order '{order}' must hold xx, yy"):
        load_convert_settings(settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trust_pickle = true", "trust_pickle is not known"),
        ("[columns]\nenergy = 5", "columns.energy must be a text, not 5"),
        ('[labels]\nabsent_if_zero = ["energy"]', r"absent_if_zero\[0\] 'energy' is not known"),
    ],
)
def test_settings_that_are_refused(tmp_path, text, words):
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_convert_settings(path)


def test_zeros_that_stand_for_nothing(tmp_path):
    cells = [
        Atoms("Cu", cell=[2, 2, 2], pbc=True, info={"energy": 0.0, "stress": np.full((3, 3), x)}) for x in (0, 1e-9)
    ]
    path = write_extxyz(tmp_path / "a.xyz", cells)
    read = structures(path, absent_if_zero=("stress",))
    assert read[0].stress is None and read[1].stress is not None and read[0].energy == 0
    assert structures(path)[0].stress is not None
    assert reasons(frames(path, absent_if_zero=("stress",), require=("stress",))) == ["no_stress", ""]


# HDF5


@pytest.mark.parametrize("lengths", [{"ptr": "data/first"}, {"n_atoms": "data/sizes"}])
def test_hdf5_by_columns(tmp_path, lengths):
    atoms = samples() + metals(600)  # more than two blocks
    path = write_hdf5(tmp_path / "a.h5", atoms)
    read = frames(path, require=BOTH, columns={**COLUMNS, **lengths})
    alike([frame.structure for frame in read], atoms)
    assert [frame.info["name"] for frame in read] == [f"frame {n}" for n in range(603)]
    assert [frame.structure.charge for frame in read[:4]] == [0, 1, 0, 1]
    assert read[2].source_id == "a.h5#2"


def test_hdf5_of_symbols_in_other_units(tmp_path):
    atoms = samples()
    symbols = [symbol for a in atoms for symbol in a.get_chemical_symbols()]
    path = write_hdf5(tmp_path / "a.h5", atoms, Z=symbols, E=np.arange(3.0), box=None)
    columns = {key: name for key, name in COLUMNS.items() if key != "cell"} | {"ptr": "data/first"}
    units_of_it = SourceUnits(length="Bohr", energy="Hartree", forces="Hartree/Bohr")
    read = structures(path, columns=columns, units=units_of_it, energy_per_atom=True)
    assert read[2].energy == pytest.approx(2 * 27.211386024367243 * len(atoms[2]), rel=1e-9)
    assert not read[2].pbc.any() and read[2].cell.tolist() == np.zeros((3, 3)).tolist()
    np.testing.assert_allclose(read[0].positions, atoms[0].positions * units.Bohr, rtol=1e-14)
    np.testing.assert_array_equal(read[0].numbers, atoms[0].numbers)
    path = write_hdf5(tmp_path / "b.h5", atoms, Z=["Xx", *symbols[1:]])
    assert reasons(frames(path, columns=columns)) == ["unknown_element", "", ""]


@pytest.mark.parametrize(
    ("changes", "columns", "words"),
    [
        ({}, {"energy": "data/Energy"}, r"lacks energy \('data/Energy'\)"),
        ({"Z": None}, {}, r"lacks numbers \('data/Z'\)"),
        ({}, {"ptr": "nowhere"}, "lacks ptr"),
        ({"E": np.arange(2.0)}, {}, r"'data/E' has shape \(2,\), not 3 rows"),
        ({"E": 5.0}, {}, r"'data/E' has shape \(\), not 3 rows"),
        ({"box": np.zeros((3, 5))}, {}, r"'data/box' has shape \(3, 5\)"),
        ({"first": [0, 9, 4, 12]}, {}, "'ptr' is damaged between structures 0 and 2"),
        ({"first": [0, 3, 4, 90]}, {}, "atoms 0 to 90 of"),
        ({"first": [0, 3, 4, 6]}, {}, "'ptr' ends at atom 6 of"),
    ],
)
def test_hdf5_that_does_not_fit(tmp_path, changes, columns, words):
    path = write_hdf5(tmp_path / "a.h5", samples(), **changes)
    with pytest.raises(SourceError, match=words):
        frames(path, columns={**COLUMNS, "ptr": "data/first", **columns})


def test_hdf5_without_lengths(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", samples())
    with pytest.raises(SourceError, match=r"neither 'ptr' nor 'n_atoms'"):
        frames(path, columns=COLUMNS)


def test_a_bad_frame_of_hdf5_is_one_frame(tmp_path):
    energies = np.array([np.nan, np.inf, 2.0])
    path = write_hdf5(tmp_path / "a.h5", samples(), E=energies)
    columns = {**COLUMNS, "ptr": "data/first"}
    assert reasons(frames(path, columns=columns)) == ["", "non_finite_energy", ""]
    assert reasons(frames(path, columns=columns, require=BOTH)) == ["no_energy", "non_finite_energy", ""]


# JSON


def test_pymatgen(tmp_path):
    atoms = samples()
    path = tmp_path / "a.json"
    path.write_text(json.dumps([pymatgen_entry(a) for a in atoms]))
    read = structures(
        path, "pymatgen", fields=OUTPUTS, units=SourceUnits(stress="-GPa"), stress_order="xx yy zz xy yz xz"
    )
    alike(read, atoms, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(read[1].stress, -SHEARED * 0.006241509074460763, rtol=1e-7)
    assert read[0].energy == atoms[0].calc.results["energy"]  # to the last digit
    assert frames(path, "pymatgen")[0].info["group"] == "AIMD"


def test_pymatgen_charges_and_lattices(tmp_path):
    entry = pymatgen_entry(samples()[2])
    entry["structure"] |= {"charge": 2}
    entry["structure"]["lattice"]["pbc"] = [True, True, False]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([entry]))
    (structure,) = structures(path, "pymatgen")
    assert structure.charge == 2 and structure.pbc.tolist() == [True, True, False]


def test_jarvis_energies_are_per_atom(tmp_path):
    atoms = [*metals(1), *samples()[1:]]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([jarvis_entry(a, cartesian=n == 0) for n, a in enumerate(atoms)]))
    read = structures(path, "jarvis", fields=FieldNames(energy="total_energy"), energy_per_atom=True, require=BOTH)
    alike(read, atoms, rtol=1e-12, atol=1e-12)


def test_malformed_entries(tmp_path):
    good, entries = samples()[2], []
    for _ in range(6):
        entries.append(pymatgen_entry(good))
    entries[0]["structure"]["sites"][0]["species"][0]["element"] = "Xx"
    entries[1]["structure"]["sites"][0]["species"] = [{"element": "Cu", "occu": 0.5}, {"element": "Au", "occu": 0.5}]
    del entries[2]["structure"]["sites"]
    entries[3]["outputs"]["forces"].pop()
    entries[4]["outputs"] = None
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*entries, "words", None]))
    found = frames(path, "pymatgen", fields=OUTPUTS, require=BOTH)
    assert reasons(found) == [
        *("unknown_element", "disordered", "unreadable", "forces_shape", "no_energy", "", "unreadable", "unreadable")
    ]
    assert "'outputs.energy'" in str(found[4].error) and found[5].source_id == "a.json#5"


@pytest.mark.parametrize("text", ['{"a": 1}', "5", "[]", "", "\x00\x01", "[1, 2", '[{"structure": {"sites": [1,'])
def test_json_that_is_no_list(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=r"a\.json"):
        frames(path, "pymatgen")


# Compressed files


@pytest.mark.parametrize(("suffix", "opener"), [(".xz", lzma.open), (".bz2", bz2.open), (".gz", gzip.open)])
@pytest.mark.parametrize("kind", ["extxyz", "pymatgen"])
def test_compressed_files(tmp_path, kind, suffix, opener):
    atoms = metals(40)
    if kind == "extxyz":
        content = write_extxyz(tmp_path / "a.xyz", atoms).read_bytes()
    else:
        content = json.dumps([pymatgen_entry(a) for a in atoms]).encode()
    path = tmp_path / f"b.{'xyz' if kind == 'extxyz' else 'json'}{suffix}"
    with opener(path, "wb") as file:
        file.write(content)
    fields = {} if kind == "extxyz" else {"name": kind, "fields": OUTPUTS}
    alike(structures(path, **fields), atoms, rtol=1e-7, atol=1e-7)
    whole = path.read_bytes()
    for part in (len(whole) - 5, len(whole) // 2, 10):
        path.write_bytes(whole[:part])
        with pytest.raises(SourceError, match=path.name):
            frames(path, **fields)
    path.write_bytes(b"no archive at all")
    with pytest.raises(SourceError, match=path.name):
        frames(path, **fields)


# Folders, missing packages, damage


def test_a_folder_stands_for_its_files(tmp_path):
    for name in ("b/2.xyz", "b/1.extxyz", "a.xyz.gz"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(write_extxyz(tmp_path / "frames.xyz", molecules(20)), path)
    (tmp_path / "set" / "README.md").write_text("no source")
    with gzip.open(tmp_path / "set" / "a.xyz.gz", "wb") as file:
        file.write((tmp_path / "frames.xyz").read_bytes())
    found = expand_sources([tmp_path / "set"], ReadSettings())
    assert [path.relative_to(tmp_path / "set").as_posix() for path in found] == ["a.xyz.gz", "b/1.extxyz", "b/2.xyz"]
    convert([tmp_path / "set"], "t", tmp_path / "out", load_convert_settings(None))
    assert read_manifest(tmp_path / "out").structures() == 60
    with pytest.raises(SourceError, match=r"set holds no file with the suffix \.aselmdb"):
        expand_sources([tmp_path / "set"], ReadSettings(format="aselmdb"))
    with pytest.raises(SourceError, match=r"nowhere does not exist"):
        expand_sources([tmp_path / "nowhere"], ReadSettings())


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("a.h5", "h5py"),
        ("a.json", "ijson"),
        ("a.lmdb", "lmdb"),
        ("a.aselmdb", "ase_db_backends"),
        ("deepmd", "dpdata"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    path = write_deepmd(tmp_path / name, waters(2)) if name == "deepmd" else tmp_path / name
    if name == "a.aselmdb":
        write_aselmdb(path, samples(), [{}] * 3)
    elif name != "deepmd":
        path.write_text("[]")

    def without(module: str) -> Any:
        if module == package:
            raise ImportError(module)
        return import_module(module)

    monkeypatch.setattr("hydrazero.shards.readers.opening.import_module", without)
    kind = {"a.json": "pymatgen", "deepmd": "deepmd"}.get(name)
    wanted = rf"needs the package {package.replace('_', '-')}: pip install 'hydrazero\[formats\]'\."
    with pytest.raises(SourceError, match=wanted):
        frames(path, kind, trust_pickle=True)


@pytest.mark.parametrize("kind", ["hdf5", "pymatgen", "n2p2", "xz"])
def test_a_file_damaged_anywhere_ends_in_a_sentence(tmp_path, kind):
    atoms = samples()
    path = tmp_path / {"hdf5": "a.h5", "pymatgen": "a.json", "n2p2": "a.data", "xz": "a.xyz.xz"}[kind]
    if kind == "hdf5":
        write_hdf5(path, atoms)
    elif kind == "pymatgen":
        path.write_text(json.dumps([pymatgen_entry(a) for a in atoms]))
    elif kind == "n2p2":
        path.write_text("".join(n2p2_text(a, -1.0) for a in atoms))
    else:
        path.write_bytes(lzma.compress(write_extxyz(tmp_path / "b.xyz", atoms).read_bytes()))
    whole, name = path.read_bytes(), "extxyz" if kind == "xz" else kind
    more = {"columns": {**COLUMNS, "ptr": "data/first"}, "fields": OUTPUTS if kind == "pymatgen" else FieldNames()}
    told = 0
    for place in range(0, len(whole) - 8, max(len(whole) // 150, 1)):
        damaged = bytearray(whole)
        damaged[place : place + 8] = bytes(byte ^ 0xFF for byte in damaged[place : place + 8])
        path.write_bytes(bytes(damaged))
        try:
            told += any(isinstance(frame.error, StructureError) for frame in frames(path, name, **more))
        except HydrazeroError as error:
            assert path.name in str(error)
            told += 1
    assert told > 10
