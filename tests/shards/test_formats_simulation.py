"""Readers of what simulation and training codes write: DeePMD, n2p2, LMDB of pickles, ASE's LMDB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from ase import units
from format_files import (
    ATOMIC,
    BOTH,
    TENSORS,
    alike,
    frames,
    n2p2_text,
    reasons,
    samples,
    structures,
    tensors,
    waters,
    write_aselmdb,
    write_deepmd,
    write_lmdb,
)
from sources import metals

from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers import FieldNames, ReadSettings, expand_sources

# DeePMD and n2p2


def test_deepmd(tmp_path):
    atoms = waters(6)
    folder = write_deepmd(tmp_path / "run" / "b", atoms, virial=[np.arange(9.0)] * 3)
    write_deepmd(tmp_path / "run" / "a", waters(2))
    read = structures(folder, "deepmd", require=BOTH)
    alike(read, atoms)
    symmetric = np.array([[0, 2, 4], [2, 4, 6], [4, 6, 8]])
    np.testing.assert_allclose(read[5].stress, -symmetric / 210, rtol=1e-12)
    settings = ReadSettings(format="deepmd")
    assert expand_sources([tmp_path / "run"], settings) == [tmp_path / "run" / "a", folder]


def test_deepmd_without_a_box(tmp_path):
    folder = write_deepmd(tmp_path / "a", waters(2), box=None)
    (folder / "nopbc").touch()
    read = structures(folder, "deepmd")
    assert not read[0].pbc.any() and not read[0].cell.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"force": [np.zeros(4)] * 2}, "cannot be read by dpdata"),
        ({"coord": None}, "cannot be read by dpdata"),
        ({"coord": np.array([None])}, "cannot be read by dpdata"),  # needs a pickle
        ({"real_atom_types": [[0, 1, 1]] * 2}, "has mixed types"),
    ],
)
def test_deepmd_that_cannot_be_read(tmp_path, changes, words):
    with pytest.raises(SourceError, match=words):
        frames(write_deepmd(tmp_path / "a", waters(4), **changes), "deepmd")


def test_deepmd_of_unknown_elements_or_no_folder(tmp_path):
    folder = write_deepmd(tmp_path / "a", waters(2), kinds=["Water", "H"])
    assert reasons(frames(folder, "deepmd")) == ["unknown_element"] * 2
    with pytest.raises(SourceError, match=r"is not a folder"):
        frames(folder / "type.raw", "deepmd")
    with pytest.raises(SourceError, match=r"has no file type\.raw"):
        frames(folder / "set.000", "deepmd")
    with pytest.raises(SourceError, match=r"holds no folder with a file type\.raw"):
        expand_sources([folder / "set.000"], ReadSettings(format="deepmd"))


def test_n2p2_in_atomic_units(tmp_path):
    atoms = samples()
    path = tmp_path / "input.data"
    path.write_text("".join(n2p2_text(a, -1.5 - n) for n, a in enumerate(atoms)))
    read = structures(path, "n2p2", units=ATOMIC, fields=FieldNames(charge="total_charge"), require=BOTH)
    assert [s.energy for s in read] == [-1.5 * units.Hartree, -2.5 * units.Hartree, -3.5 * units.Hartree]
    assert read[0].energy == pytest.approx(-40.81707903, abs=1e-6) and read[0].charge == 1
    for structure, a in zip(read, atoms, strict=True):
        np.testing.assert_array_equal(structure.positions, a.positions * units.Bohr)
        np.testing.assert_allclose(structure.forces, a.calc.results["forces"] * 51.42206748, rtol=1e-7)
        assert structure.pbc.tolist() == a.pbc.tolist()


def test_n2p2_that_is_damaged(tmp_path):
    first, second = (n2p2_text(a, -1.0) for a in samples()[:2])
    path = tmp_path / "input.data"
    path.write_text(first + second.replace("Cu", "Xx") + second.replace("energy -1.0\n", "") + second)
    found = frames(path, "n2p2", units=ATOMIC, require=BOTH)
    assert [bool(reason) for reason in reasons(found)] == [False, True, True, False]
    for text in (first + second[:-5], first.replace("end\n", "") + second):
        path.write_text(text)
        with pytest.raises(SourceError, match=r"there is no 'end'"):
            frames(path, "n2p2", units=ATOMIC)
    path.write_text("nothing of the kind\n")
    with pytest.raises(SourceError, match=r"holds no structure"):
        frames(path, "n2p2", units=ATOMIC)


# LMDB


def test_lmdb_of_tensors(tmp_path):
    from torch_geometric.data import Data

    atoms = samples()
    path = write_lmdb(
        tmp_path / "a.lmdb", [tensors(atoms[0]), Data(**tensors(atoms[1])), tensors(atoms[2], pbc=[1] * 3)]
    )
    read = frames(path, columns=TENSORS, trust_pickle=True, require=BOTH)
    alike([frame.structure for frame in read], atoms)
    assert read[1].info["sid"] == 7 and read[1].source_id == "a.lmdb#1"


def test_bad_entries_of_lmdb(tmp_path):
    good = samples()[2]
    without = {key: value for key, value in tensors(good).items() if key != "pos"}
    values = [b"no pickle", without, tensors(good, cell=np.zeros(5)), 5, tensors(good, y=float("inf")), tensors(good)]
    found = frames(write_lmdb(tmp_path / "a.lmdb", values), columns=TENSORS, trust_pickle=True)
    assert reasons(found) == ["unreadable", "unreadable", "bad_cell", "unreadable", "non_finite_energy", ""]
    assert "has no 'pos'" in str(found[1].error)


class _Touch:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_a_pickle_runs_only_if_it_is_trusted(tmp_path):
    harm = tmp_path / "harm"
    path = write_lmdb(tmp_path / "a.lmdb", [_Touch(harm)])
    with pytest.raises(SourceError, match=r"can run any code .* --trust-pickle"):
        frames(path, columns=TENSORS)
    with pytest.raises(SourceError, match=r"--trust-pickle"):
        convert([path], "t", tmp_path / "out", load_convert_settings(None))
    assert not harm.exists() and not (tmp_path / "out").exists()
    frames(path, columns=TENSORS, trust_pickle=True)
    assert harm.exists()  # so it would have been seen


def test_aselmdb(tmp_path):
    atoms, data = samples(), [{"charge": -1, "spin": 2}, {"charge": 0, "spin": 1}, {"charge": 0, "spin": 1}]
    path = write_aselmdb(tmp_path / "a.aselmdb", atoms, data)
    read = frames(path, fields=FieldNames(multiplicity="spin"), require=BOTH)
    alike([frame.structure for frame in read], atoms)
    assert [(f.structure.charge, f.structure.multiplicity) for f in read] == [(-1, 2), (0, 1), (0, 1)]
    assert read[0].info["tag"] == "x" and read[2].source_id == "a.aselmdb#3"


def test_a_damaged_row_of_aselmdb(tmp_path):
    path = write_aselmdb(tmp_path / "a.aselmdb", samples(), [{}] * 3)
    with lmdb.open(str(path), subdir=False, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"2", b"no zlib")
    assert reasons(frames(path)) == ["", "unreadable", ""]


@pytest.mark.parametrize("suffix", [".lmdb", ".aselmdb"])
def test_an_lmdb_that_is_cut_off(tmp_path, suffix):
    """Its pages are mapped, and reading what is not there would end the process without a word."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".lmdb":
        write_lmdb(path, [tensors(a) for a in metals(50)])
    else:
        write_aselmdb(path, metals(50), [{}] * 50)
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))
    for size in (used // 2, 8192, 4097, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=path.name):
            frames(path, columns=TENSORS, trust_pickle=True)
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(SourceError, match=path.name):
        frames(path, columns=TENSORS, trust_pickle=True)
