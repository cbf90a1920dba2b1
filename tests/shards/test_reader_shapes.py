"""Arrays for all frames, cells and periodicity in every form, symbols as text: read with the right value, or bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_files import (
    ATOMIC,
    BOTH,
    COLUMNS,
    TENSORS,
    frames,
    n2p2_text,
    reasons,
    samples,
    structures,
    tensors,
    waters,
    write_deepmd,
    write_hdf5,
    write_lmdb,
)

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.parts.frame_parts import numbers_of_symbols
from hydrazero.shards.readers.parts.geometry import cell_matrix, periodicity
from hydrazero.shards.targets import TargetSection

# One array for all frames


def group(path: Path, frames_of_it: int = 3, **changes: Any) -> Path:
    """Write a group of frames of three atoms."""
    positions = np.array([[[0, 0, 0], [0, 0, 1 + 0.1 * n], [0, 1, 0]] for n in range(frames_of_it)], dtype=float)
    values = {
        "numbers": [8, 1, 1],
        "positions": positions,
        "energy": -np.arange(1.0, frames_of_it + 1),
        "forces": np.arange(9.0 * frames_of_it).reshape(-1, 3, 3),
        "cell": np.diag([4.0, 5.0, 6.0]),
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            if value is not None:
                file.create_dataset(f"g/{name}", data=value)
    return path


@pytest.mark.parametrize(
    ("pbc", "flags"),
    [
        ([True, True, False], ["110"] * 3),
        ([[True, True, False]], ["110"] * 3),
        ([[1, 1, 0], [0, 0, 0], [1, 1, 1]], ["110", "000", "111"]),
        (b"T T F", ["110"] * 3),
        ([b"TTF", b"F F F", b"T"], ["110", "000", "111"]),
        (False, ["000"] * 3),
        (None, ["111"] * 3),
    ],
)
def test_a_pbc_is_shared_by_its_rank(tmp_path, pbc, flags):
    if isinstance(pbc, list) and isinstance(pbc[0], bytes):
        pbc = np.array(pbc)
        with pytest.raises(StructureError):
            periodicity(pbc, np.eye(3))  # three texts are no three flags
        pbc = pbc[:, None]
    read = structures(group(tmp_path / "a.h5", pbc=pbc), "hdf5_groups", require=BOTH)
    assert ["".join(map(str, s.pbc.astype(int))) for s in read] == flags


def test_flags_of_five_frames(tmp_path):
    read = structures(group(tmp_path / "a.h5", 5, pbc=[True, False, True, False, False]), "hdf5_groups")
    assert [s.pbc.all() for s in read] == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("cell", "lengths"),
    [
        (np.diag([4.0, 5, 6]), [[4, 5, 6]] * 3),
        ([4.0, 5, 6], [[4, 5, 6]] * 3),
        ([4.0, 5, 6, 90, 90, 90], [[4, 5, 6]] * 3),
        (np.array([np.eye(3) * n for n in (4, 5, 6)]), [[4] * 3, [5] * 3, [6] * 3]),
        (np.array([np.eye(3).ravel() * n for n in (4, 5, 6)]), [[4] * 3, [5] * 3, [6] * 3]),
    ],
)
def test_a_cell_is_shared_by_its_rank(tmp_path, cell, lengths):
    read = structures(group(tmp_path / "a.h5", cell=cell), "hdf5_groups")
    np.testing.assert_allclose([np.diag(s.cell) for s in read], lengths)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"energy": [-1.0]}, r"'energy' has shape \(1,\), where 3 frames of 3 atoms need \(3,\)"),
        ({"energy": -1.0}, r"'energy' has shape \(\)"),
        ({"forces": np.ones((3, 3))}, r"'forces' has shape \(3, 3\), .* need \(3, 3, 3\) or \(3, 9\)"),
        ({"stress": np.ones((3, 3))}, r"'stress' has shape \(3, 3\)"),
        ({"stress": np.ones(6)}, r"'stress' has shape \(6,\)"),
        ({"charge": [1, 0]}, r"'charge' has shape \(2,\)"),
        ({"numbers": [[8, 1, 1]] * 2}, r"'numbers' has shape \(2, 3\)"),
        ({"cell": np.ones((2, 3, 3))}, r"'cell' has shape \(2, 3, 3\)"),
        ({"cell": [[4.0, 5, 6]] * 3}, r"'cell' has shape \(3, 3\), which can be one cell, or three lengths"),
    ],
)
def test_arrays_that_are_neither_shared_nor_one_for_each_frame(tmp_path, changes, words):
    found = frames(group(tmp_path / "a.h5", **changes), "hdf5_groups")
    assert reasons(found) == ["ambiguous_shape"] * 3
    with pytest.raises(StructureError, match=words):
        raise found[0].error


def test_what_the_frames_of_a_group_may_share(tmp_path):
    symbols = np.array([b"O", b"H", b"H"])
    changes = {"numbers": symbols, "charge": -1, "multiplicity": [1, 2, 3], "forces": np.ones((3, 9))}
    targets = {
        "dipole": TargetSection(field="mu", kind="vector"),
        "spins": TargetSection(field="spins", of="atom"),
    }
    path = group(tmp_path / "a.h5", **changes, mu=[[1.0, 2, 3]] * 3, spins=[[0.5, 0, 0]] * 3)
    read = structures(path, "hdf5_groups", require=BOTH, targets=targets)
    assert [(s.charge, s.multiplicity, s.energy) for s in read] == [(-1, 1, -1), (-1, 2, -2), (-1, 3, -3)]
    assert read[2].forces.shape == (3, 3) and read[2].numbers.tolist() == [8, 1, 1]
    assert read[1].targets["dipole"].tolist() == [1, 2, 3] and read[1].atom_targets["spins"].tolist() == [0.5, 0, 0]
    path = group(tmp_path / "b.h5", numbers=[[8, 1, 1], [1, 8, 1], [1, 1, 8]])
    assert [s.numbers.tolist() for s in structures(path, "hdf5_groups")] == [[8, 1, 1], [1, 8, 1], [1, 1, 8]]


def test_shared_parts_of_ragged_arrays(tmp_path):
    columns = {**COLUMNS, "ptr": "data/first", "pbc": "data/pbc"}
    path = write_hdf5(tmp_path / "a.h5", samples(), pbc=[True, True, False], box=np.eye(3) * 9.0, q=1)
    read = structures(path, columns=columns)
    assert all(s.pbc.tolist() == [True, True, False] and s.cell[2, 2] == 9 and s.charge == 1 for s in read)
    path = write_hdf5(
        tmp_path / "b.h5", samples(), pbc=[[1, 1, 0], [0, 0, 0], [1, 1, 1]], box=[[9.0] * 3 + [90] * 3] * 3
    )
    assert [s.pbc.tolist() for s in structures(path, columns=columns)][1] == [False] * 3
    with pytest.raises(SourceError, match=r"one cell, or three lengths for each of 3 frames"):
        frames(write_hdf5(tmp_path / "e.h5", samples(), box=[[9.0, 8, 7]] * 3, pbc=True), columns=columns)
    path = write_hdf5(tmp_path / "c.h5", samples(), pbc=[[2, 1, 0]] * 3)
    assert reasons(frames(path, columns=columns)) == ["bad_pbc"] * 3
    for sizes in (np.array([0.0, np.nan]), np.zeros((2, 2), int), np.array([b"a"])):
        path = write_hdf5(tmp_path / "d.h5", samples(), first=sizes, pbc=True)
        with pytest.raises(SourceError, match="must be a list of integers"):
            frames(path, columns=columns)


# Flags, cells and symbols


@pytest.mark.parametrize(
    "value", ["F F F", "FFF", b"f f f", "false", "0 0 0", ["F"] * 3, 0, [0, 0.0, False], "[F, F, F]"]
)
def test_flags_that_are_false(value):
    assert periodicity(value, np.eye(3)).tolist() == [False] * 3


@pytest.mark.parametrize(
    "value", ["T T T", "TTT", "true", ".TRUE.", 1, [1, True, 1.0], [[True, True, True]], np.ones((1, 3))]
)
def test_flags_that_are_true(value):
    assert periodicity(value, np.zeros((3, 3))).tolist() == [True] * 3


@pytest.mark.parametrize(
    "value",
    ["", "xyz", "T F", "maybe", 2, -1, 0.5, np.nan, [1, 0], [1, 0, 2], [[1], [0, 1]], {}, np.eye(3), [], [None] * 3],
)
def test_flags_that_are_none(value):
    with pytest.raises(StructureError, match=r"not one or three flags"):
        periodicity(value, np.eye(3))


def test_cells_in_every_form():
    assert cell_matrix(None, 2).tolist() == cell_matrix([], 2).tolist() == np.zeros((3, 3)).tolist()
    assert cell_matrix([1, 2, 3], 2).tolist() == np.diag([2, 4, 6]).tolist()
    hexagonal = cell_matrix([3, 3, 5, 90, 90, 120], 2)
    np.testing.assert_allclose(np.linalg.norm(hexagonal, axis=1), [6, 6, 10])
    np.testing.assert_allclose(hexagonal[0] @ hexagonal[1], -18)
    assert cell_matrix([[np.arange(9.0).reshape(3, 3)]], 1)[1].tolist() == [3, 4, 5]
    for wrong in (
        5.0,
        [1, 2],
        np.ones((3, 2)),
        np.ones((2, 3)),
        [4, 5, 6, 0.1, 0, 0],
        [1, 1, 1, 90, 90, 200],
        "abc",
        [1, 1, 1, 30, 30, 120],
        [[1], [2, 3]],
        {},
        np.array([1j] * 9),
        np.ones((3, 3)) > 0,
    ):
        with pytest.raises(StructureError, match="cell"):
            cell_matrix(wrong, 1)


@pytest.mark.parametrize(
    "symbols",
    ["O H H", "OH2", b"O,H,H", ["O", "H", "H"], np.array([b"O", b"H", b"H", b""]), "['O', 'H', 'H']", "8 1 1"],
)
def test_symbols_as_text(symbols):
    assert np.asarray(numbers_of_symbols(symbols)).tolist() == [8, 1, 1]


@pytest.mark.parametrize("symbols", ["X", "O H Xx", "watermelon!", [["O", "H"]] * 2])
def test_texts_that_are_no_symbols(symbols):
    with pytest.raises(StructureError):
        numbers_of_symbols(symbols)


# Parquet, LMDB, DeePMD


def test_rows_of_parquet(tmp_path):
    rows = [
        {"numbers": "O H", "positions": [[0.0, 0, 0], [0, 0, 1]], "energy": -1.0, "cell": [5.0, 6, 7], "pbc": "T T F"},
        {"numbers": "OH", "positions": [[0.0, 0, 0], [0, 0]], "energy": -1.0, "cell": None, "pbc": "F F F"},
        {"numbers": "O H", "positions": [[0.0, 0, 0], [0, 0, 1]], "energy": None, "cell": [], "pbc": "why"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = frames(tmp_path / "a.parquet")
    assert reasons(found) == ["", "positions_shape", "bad_pbc"]
    first = found[0].structure
    assert first.numbers.tolist() == [8, 1] and first.pbc.tolist() == [True, True, False] and first.cell[2, 2] == 7
    pq.write_table(pa.table({"numbers": [["O", "H"]], "positions": ["0 0 0 0 0 1"]}), tmp_path / "b.parquet")
    assert reasons(frames(tmp_path / "b.parquet")) == ["positions_shape"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cell": None}, ""),
        ({"cell": [9, 9, 9, 90, 90, 90], "pbc": [[True, True, False]]}, ""),
        ({"pbc": "TTT"}, ""),
        ({"pbc": None}, ""),
        ({"pbc": [3, 3, 3]}, "bad_pbc"),
        ({"pbc": np.eye(3)}, "bad_pbc"),
        ({"cell": "cubic"}, "cell_shape"),
        ({"pos": [[0, 0, 0], [1]]}, "positions_shape"),
        ({"pos": "0 0 0"}, "positions_shape"),
        ({"pos": None}, "positions_shape"),
        ({"atomic_numbers": None}, "atomic_numbers_shape"),
        ({"y": {"a": 1}}, "energy_shape"),
        ({"force": [[1, 2, 3], [1]]}, "forces_shape"),
        ({"y": 10**400}, "energy_shape"),
        ({"force": np.ones((2, 3)) * 1j}, "forces_shape"),
    ],
)
def test_entries_of_lmdb(tmp_path, changes, reason):
    path = write_lmdb(tmp_path / "a.lmdb", [tensors(samples()[2], **changes)])
    (frame,) = frames(path, columns=TENSORS, trust_pickle=True)
    assert reasons([frame]) == [reason]
    if isinstance(changes.get("cell"), list):
        assert frame.structure.pbc.tolist() == [True, True, False] and frame.structure.cell[0, 0] == 9


def test_service_keys_of_lmdb(tmp_path):
    path = write_lmdb(tmp_path / "a.lmdb", [tensors(a) for a in samples()])
    with lmdb.open(str(path), subdir=False, lock=False) as file, file.begin(write=True) as transaction:
        for key in (b"__len__", b"__keys__", b"metadata", b"num_samples", b"Version"):
            transaction.put(key, b"anything")
        transaction.put(b"elements", b"\x80\x04]\x94.")  # an empty list
        transaction.put(b"broken", b"anything")
    found = frames(path, columns=TENSORS, trust_pickle=True)
    assert reasons(found) == ["", "", "", "unreadable"] and found[3].source_id == "a.lmdb#broken"


def test_deepmd_without_forces_or_energies(tmp_path):
    atoms = waters(4)
    read = structures(write_deepmd(tmp_path / "a", atoms, force=None), "deepmd", require=("energy",))
    assert [s.energy for s in read] == [a.calc.results["energy"] for a in atoms] and read[0].forces is None
    found = frames(tmp_path / "a", "deepmd", require=BOTH)
    assert reasons(found) == ["no_forces"] * 4
    read = structures(write_deepmd(tmp_path / "b", atoms, force=None, energy=None), "deepmd")
    assert read[3].energy is None and len(read[3]) == 3
    folder = write_deepmd(tmp_path / "c", atoms)
    (folder / "set.001" / "force.npy").unlink()
    with pytest.raises(SourceError, match=r"set\.001 has no force\.npy, other sets have one"):
        frames(folder, "deepmd")
    folder = write_deepmd(tmp_path / "d", atoms)
    (folder / "type.raw").write_text("0\n1\n7\n")
    with pytest.raises(SourceError, match="cannot be read by dpdata"):
        frames(folder, "deepmd")


def test_npz_of_symbols_in_each_frame(tmp_path):
    positions = np.array([[[0, 0, 0], [0, 0, 1]]] * 3, dtype=float)
    numbers = np.array([["O", "H"], ["H", "O"], ["O", "O"]])
    np.savez(tmp_path / "a.npz", z=numbers, R=positions, E=np.zeros(3), charge=np.array([1, 0, -1]))
    read = structures(tmp_path / "a.npz")
    assert [(s.numbers.tolist(), s.charge) for s in read] == [([8, 1], 1), ([1, 8], 0), ([8, 8], -1)]


def test_a_comment_of_n2p2_with_the_word_begin(tmp_path):
    atoms = samples()
    text = "".join(n2p2_text(a, -1.0) for a in atoms)
    (tmp_path / "input.data").write_text(text.replace("comment made here", "comment begin of the beginning"))
    read = structures(tmp_path / "input.data", "n2p2", units=ATOMIC, require=BOTH)
    assert [len(s) for s in read] == [len(a) for a in atoms]


def test_a_link_that_leads_to_nothing_and_is_not_read(tmp_path):
    path = group(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        file["g/total_spin"] = h5py.SoftLink("/nothing")
    assert all(frame.structure is not None for frame in frames(path, "hdf5_groups"))


# HDF5 files that lead to others


@pytest.mark.parametrize("way", ["link", "link behind a link", "storage", "virtual"])
def test_numbers_of_another_file_are_not_read(tmp_path, way):
    other = group(tmp_path / "other.h5")
    path = group(tmp_path / "a.h5", forces=None)
    (tmp_path / "numbers.raw").write_bytes(np.ones(27).tobytes())
    with h5py.File(path, "a") as file:
        if way == "link":
            file["g/forces"] = h5py.ExternalLink(str(other), "/g/forces")
        elif way == "link behind a link":
            file["outside"] = h5py.ExternalLink(str(other), "/g")
            file["g/forces"] = h5py.SoftLink("/outside/forces")
        elif way == "storage":
            file["g"].create_dataset("forces", (3, 3, 3), "f8", external=[(str(tmp_path / "numbers.raw"), 0, 216)])
        else:
            layout = h5py.VirtualLayout((3, 3, 3), "f8")
            layout[:] = h5py.VirtualSource(str(other), "/g/forces", (3, 3, 3))
            file["g"].create_virtual_dataset("forces", layout)
    columns = {"numbers": "g/numbers", "positions": "g/positions", "forces": "g/forces", "ptr": "g/energy"}
    for name, more in (("hdf5_groups", {}), ("hdf5", {"columns": columns})):
        with pytest.raises(SourceError, match=r"a\.h5: .*(is not followed|which is not read)"):
            frames(path, name, **more)
    with h5py.File(path, "a") as file:
        del file["g/forces"]
        file.pop("outside", None)
        file["twin"], file["circle"] = h5py.SoftLink("/g"), h5py.SoftLink("/circle")
        file["g/forces"] = h5py.SoftLink("/twin/positions")  # within the file
    assert len(structures(path, "hdf5_groups", require=BOTH)) == 3
