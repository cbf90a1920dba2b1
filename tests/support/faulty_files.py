"""Files with any keys, shapes and types, in every format that a reader knows: what the fuzzer of readers reads."""

from __future__ import annotations

import copy
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import h5py
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ase import Atoms
from format_files import jarvis_entry, n2p2_text, pymatgen_entry, samples, tensors, waters, write_deepmd
from hypothesis import strategies as st

Write = Callable[[Path, Any], Path]

# Values

numbers = st.one_of(
    st.integers(-3, 200),
    st.sampled_from([2**31, -(2**63), 2**64, 10**30, 0.5, 1.0, 1e-10, 1e39, 1e308, float("nan"), float("inf")]),
)
texts = st.sampled_from(
    ["", "F F F", "TTF", "C H O", "H2O", "eV", "kcal/mol", "nm", "1.5", "nan", "\0", "é", "begin", "[1]"]
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 6, 9]), max_size=4).map(tuple)
kinds = st.sampled_from(["f8", "f4", "i8", "u1", "?", "S3", "U3", "c16", "M8[s]"])
arrays = st.builds(
    lambda shape, kind, fill: np.full(shape, fill if kind[0] not in "SUM" else 1).astype(kind),
    shapes,
    kinds,
    st.sampled_from([0, 1, 2, 7]),
)
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
nested = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
values = st.one_of(plain, arrays, nested, st.binary(max_size=6))
ABSENT = "<absent>"


def changed(base: dict[str, Any], more: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Return dicts of which up to three values are replaced, removed or added."""
    keys = st.sampled_from([*base, *more])
    changes = st.dictionaries(keys, st.one_of(st.just(ABSENT), values), min_size=1, max_size=3)
    return changes.map(lambda some: {key: value for key, value in {**base, **some}.items() if not is_absent(value)})


def is_absent(value: Any) -> bool:
    return isinstance(value, str) and value == ABSENT


def json_changed(base: Any) -> st.SearchStrategy[str]:
    """Return texts of JSON in which some values, at any depth, are replaced."""
    paths = list(_paths(base))

    def build(some: list[tuple[tuple[Any, ...], Any]], cut: int) -> str:
        data = copy.deepcopy(base)
        for path, value in some:
            data = _replaced(data, path, value)
        text = json.dumps(data)
        return text if cut == 0 else text[: len(text) * cut // 10]

    changes = st.lists(st.tuples(st.sampled_from(paths), nested), min_size=1, max_size=3)
    return st.builds(build, changes, st.sampled_from([0, 0, 0, 0, 3, 9]))


def _paths(data: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def _replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    with suppress(KeyError, IndexError, TypeError):  # an earlier change may have removed the place
        data[path[0]] = _replaced(data[path[0]], path[1:], value)
    return data


def text_changed(text: str) -> st.SearchStrategy[str]:
    """Return texts in which some words or lines are replaced, repeated or removed."""
    pieces = [piece for line in text.splitlines() for piece in (*line.split(" "), "\n")]
    words = st.one_of(
        texts, numbers.map(str), st.sampled_from(["", "\n", "begin", "end", '"', "=", "pbc=", "Lattice="])
    )
    changes = st.dictionaries(st.integers(0, len(pieces) - 1), words, min_size=1, max_size=4)
    return changes.map(lambda some: " ".join(some.get(n, piece) for n, piece in enumerate(pieces)).replace("\n ", "\n"))


# Files

WATER = {
    "numbers": np.array([8, 1, 1]),
    "positions": np.array([[[0, 0, 0], [0, 0, 1 + 0.1 * n], [0, 1, 0]] for n in range(3)], dtype=float),
    "energy": np.arange(3.0),
    "forces": np.ones((3, 3, 3)),
}
OPTIONAL = ("cell", "pbc", "stress", "virial", "charge", "multiplicity", "mu", "q", "lattice", "e_unit", "r_unit")


def write_npz(folder: Path, data: dict[str, Any]) -> Path:
    keys = {"numbers": "z", "positions": "R", "energy": "E", "forces": "F"}
    np.savez(folder / "a.npz", **{keys.get(key, key): np.asarray(_even(value)) for key, value in data.items()})
    return folder / "a.npz"


def _even(value: Any) -> Any:
    """Return a value that NumPy makes an array of, or its text."""
    try:
        np.asarray(value)
    except ValueError:
        return str(value)
    return value


def _store(group: Any, data: dict[str, Any]) -> None:
    """Put values into an HDF5 group as datasets, and as attributes; leave out what HDF5 cannot hold."""
    for key, value in data.items():
        try:
            if key.startswith("@"):
                place, _, name = key[1:].rpartition("@")
                (group[place] if place else group).attrs[name] = value
            else:
                group[key] = np.asarray(value).astype("S") if np.asarray(value).dtype.kind == "U" else value
        except (TypeError, ValueError, OverflowError, KeyError, RuntimeError, UnicodeError, OSError):
            continue


ATTRIBUTES = ("@energy_unit", "@pbc", "@charge", "@energy@units", "@positions@units")


def write_groups(folder: Path, data: dict[str, Any]) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        _store(file.create_group("water"), data)
    return folder / "a.h5"


RAGGED = {
    "data/Z": np.array([8, 1, 1, 1]),
    "data/R": np.arange(12.0).reshape(4, 3),
    "data/F": np.ones((4, 3)),
    "data/E": np.arange(2.0),
    "data/box": np.array([np.eye(3) * 9.0] * 2),
    "data/first": np.array([0, 3, 4]),
    "data/q": np.zeros(2),
    "data/name": np.array([b"a", b"b"]),
}


def write_ragged(folder: Path, data: dict[str, Any]) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        _store(file, data)
    return folder / "a.h5"


def write_ragged_npz(folder: Path, data: dict[str, Any]) -> Path:
    np.savez(folder / "a.npz", **{key.replace("/", "|"): np.asarray(_even(value)) for key, value in data.items()})
    return folder / "a.npz"


def write_parquet(folder: Path, data: dict[str, Any]) -> Path:
    rows = {key: [value.tolist() if isinstance(value, np.ndarray) else value] for key, value in data.items()}
    columns: dict[str, Any] = {}
    for key, column in rows.items():
        try:
            columns[key] = pa.array(column)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            columns[key] = pa.array([str(column)])
    try:
        pq.write_table(pa.table(columns), folder / "a.parquet")
    except pa.ArrowNotImplementedError:  # a type that parquet does not have
        pq.write_table(pa.table({key: pa.array([str(column)]) for key, column in rows.items()}), folder / "a.parquet")
    return folder / "a.parquet"


def write_pickles(folder: Path, data: Any) -> Path:
    path = folder / "a.lmdb"
    with lmdb.open(str(path), subdir=False, map_size=2**20, lock=False) as file, file.begin(write=True) as transaction:
        transaction.put(b"0", pickle.dumps(data))
        transaction.put(b"other", pickle.dumps(next(iter(data.values()), None)))
        transaction.put(b"_metadata", pickle.dumps({"_property_unit_dict": data, "_distance_unit": data.get("y")}))
    return path


def write_database(folder: Path, data: dict[str, Any], kind: str = "db") -> Path:
    path = folder / f"a.{kind}"
    with ase.db.connect(str(path), type=kind, serial=True) as database:
        for some in (data, {}):
            try:
                database.write(Atoms("OH", [[0, 0, 0], [0, 0, 1]], cell=[5, 5, 5]), data=some)
            except Exception:  # what ASE's JSON does not hold
                continue
        with suppress(Exception):
            database.metadata = {"_property_unit_dict": data, "_distance_unit": data.get("energy")}
    return path


def write_text(name: str) -> Write:
    def write(folder: Path, text: str) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return write


def write_systems(folder: Path, data: dict[str, Any]) -> Path:
    path = write_deepmd(folder / "system", waters(2))
    for name, value in data.items():
        array = np.asarray(_even(value))
        if array.dtype.kind != "O":
            np.save(path / "set.000" / f"{name}.npy", array)
    for name in {"force", "energy", "box", "coord"} - set(data):
        (path / "set.000" / f"{name}.npy").unlink()
    return path


def write_tar(folder: Path, text: str) -> Path:
    for name in ("0.extxyz", "0.txt"):
        (folder / name).write_text(text if name.endswith("xyz") else "s,frame0,-1.0\n", encoding="utf-8")
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "0.extxyz", "0.extxyz")
        tar.add(folder / "0.txt", "0.txt")
    return folder / "a.tar"


def _extxyz() -> str:
    with tempfile.TemporaryDirectory() as folder:
        ase.io.write(Path(folder) / "a.xyz", samples(), format="extxyz")
        return (Path(folder) / "a.xyz").read_text()


ENTRIES = [pymatgen_entry(a) for a in samples()[1:]]
STEPS = [{"structure": entry["structure"], **entry["outputs"]} for entry in ENTRIES]
N2P2 = "".join(n2p2_text(a, -1.0) for a in samples()[:2])
ROW = {key: value[0] if key != "numbers" else value for key, value in WATER.items()}
ENTRY = {key: np.asarray(value) for key, value in tensors(samples()[2]).items()}
DATA = {"energy": -1.0, "forces": np.zeros((2, 3)), "stress": np.zeros(6), "charge": 0}
FITSNAP = {
    "Dataset": {
        "Data": [
            {
                "Positions": [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]],
                "Lattice": [[4.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 6.0]],
                "AtomTypes": ["Ta", "W"],
                "Energy": -20.5,
                "Forces": [[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]],
                "Stress": [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]],
            }
        ],
        "EnergyStyle": "electronvolt",
        "ForcesStyle": "electronvoltperangstrom",
        "StressStyle": "bar",
    }
}
XSF = """# total energy = -20.5 eV

CRYSTAL
PRIMVEC
 4.0 0.0 0.0
 0.0 5.0 0.0
 0.0 0.0 6.0
PRIMCOORD
2 1
Ta 0.0 0.0 0.0 0.1 0.2 0.3
W 2.0 2.0 2.0 -0.1 -0.2 -0.3
"""
FILES: dict[str, tuple[str, st.SearchStrategy[Any], Write]] = {
    "npz": ("npz", changed(WATER, OPTIONAL), write_npz),
    "npz_columns": ("npz", changed(RAGGED), write_ragged_npz),
    "hdf5": ("hdf5", changed(RAGGED, ("@energy_unit", "@pbc", "@data/E@units", "data/p")), write_ragged),
    "hdf5_groups": ("hdf5_groups", changed(WATER, (*OPTIONAL, *ATTRIBUTES)), write_groups),
    "parquet": ("parquet", changed(ROW, OPTIONAL), write_parquet),
    "lmdb": ("lmdb", changed(ENTRY, ("pbc", "charge", "mu")), write_pickles),
    "db": ("db", changed(DATA, ("spin", "total_charge", "q")), write_database),
    "aselmdb": ("aselmdb", changed(DATA, ("spin", "q")), lambda folder, data: write_database(folder, data, "aselmdb")),
    "pymatgen": ("pymatgen", json_changed(ENTRIES), write_text("a.json")),
    "jarvis": ("jarvis", json_changed([jarvis_entry(a, cartesian=True) for a in samples()]), write_text("a.json")),
    "mptrj": ("mptrj", json_changed({"mp-1": {"0": STEPS[0], "1": STEPS[1]}}), write_text("a.json")),
    "alexandria": ("alexandria", json_changed({"entries": STEPS}), write_text("a.json")),
    "alexandria_paths": ("alexandria", json_changed({"agm": [{"steps": STEPS}]}), write_text("a.json")),
    "json_lines": ("mptrj", json_changed(STEPS[0]), write_text("a.jsonl")),
    "fitsnap": ("fitsnap", json_changed(FITSNAP), write_text("a.json")),
    "xsf": ("xsf", text_changed(XSF), write_text("a.xsf")),
    "n2p2": ("n2p2", text_changed(N2P2), write_text("input.data")),
    "extxyz": ("extxyz", text_changed(_extxyz()), write_text("a.xyz")),
    "extxyz_tar": ("extxyz_tar", text_changed(_extxyz()), write_tar),
    "deepmd": (
        "deepmd",
        changed(
            {
                "coord": np.zeros((1, 9)),
                "box": np.eye(3).reshape(1, 9),
                "energy": np.zeros(1),
                "force": np.zeros((1, 9)),
            }
        ),
        write_systems,
    ),
    "ase": ("ase", text_changed(_extxyz()), write_text("a.extxyz")),
}
"""Name of a case -> format, content of files, and the function that writes a file."""
