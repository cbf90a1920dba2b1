"""Manifests and blocks that lie, with right checksums, are refused in one sentence before memory or time is spent."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from ase import Atoms
from ase.io import write
from sources import make_shards, metals, molecules
from structures import to_structure

from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.errors import ShardError, SourceError, StructureError
from hydrazero.shards.graphs.neighbours import half_pairs
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.readers import read_frames
from hydrazero.shards.readers.frames import FieldNames, ReadSettings
from hydrazero.shards.stream import block_reader
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.structure import check_structure


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    frames = [*molecules(30), *metals(30)]
    return make_shards(tmp_path_factory.mktemp("shards"), "both", frames)


@pytest.fixture
def folder(shards, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(block_reader, "RETRY_AFTER", ())
    return shutil.copytree(shards, tmp_path / "both")


SHARD = ("splits", "train", 0)
MANIFESTS: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "block_structures": ((*SHARD, "block_structures", 0), 10**18, r"block_structures\[0\] is 10{18}; .* at most 256"),
    "no structures": ((*SHARD, "block_structures", 0), 0, "must be at least 1"),
    "another sum": ((*SHARD, "block_structures", 0), 200, "200 structures|do not fit its blocks"),
    "a text": ((*SHARD, "block_offsets", 0), "0; touch /tmp/x", "must be a whole number, not '0; touch /tmp/x'"),
    "14.5": ((*SHARD, "atoms"), 14.5, "must be a whole number, not 14.5"),
    "true": ((*SHARD, "atoms"), True, "must be a whole number, not True"),
    "offset beyond the file": ((*SHARD, "block_offsets", 0), 512 * 10**9, "no block of .* fits between"),
    "offset inside a record": ((*SHARD, "block_offsets", 0), 100, "no block of .* fits between"),
    "size": ((*SHARD, "bytes"), 10**30, "must be at most|whole number"),
    "checksum": ((*SHARD, "sha256"), "x" * 64, "sha256"),
    "NaN": (("reference_energies", "Cu"), float("nan"), "reference_energies.Cu is nan; it must be a finite number"),
    "missing reference": (("reference_energies",), {"Cu": 0.0}, "reference_energies lacks"),
    "unknown element": (("elements", "Xx"), 1, "'Xx' is not the symbol of an element"),
    "atoms by element": (("elements", "Cu"), 1, "its counts of atoms by element add up to"),
    "float type": (("float_dtype",), "float16", "float_dtype"),
    "units": (("units", "energy"), "Hartree", "its units are .*Hartree"),
    "scale": (("labels", "forces", "rms"), 1e9, "cannot belong to the same numbers"),
    "split": (("splits", "training"), [], "splits.training"),
    "neighbours": (("degrees", "4", "histogram", "2"), 10**6, "neighbours within 4 Å add up to|largest numbers"),
    "cutoff": (("degrees", "x"), {}, "degrees.x"),
    "sizes": (("size_histogram", "-3"), 1, "must be above 0"),
    "version": (("format_version",), "a\nb", r"has format version a\\nb, but"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_lies_is_refused(folder, case):
    (*way, last), value, words = MANIFESTS[case]
    document = json.loads((folder / "manifest.json").read_text())
    place = document
    for key in way:
        place = place[key]
    place[last] = value
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ShardError, match=words) as caught:
        read_manifest(folder)
    assert "convert the task again." in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "\0", "[1, 2]", '{"format": NaN}'])
def test_a_manifest_that_is_none(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=r"manifest.json (is not|must be a table)"):
        read_manifest(folder)


def with_columns(folder: Path, changes: dict[str, Any], size: int | None = None) -> BlockReader:
    """Write the first training block with other columns (None removes one), and all checksums for it."""
    document = json.loads((folder / "manifest.json").read_text())
    shard = document["splits"]["train"][0]
    with tarfile.open(folder / shard["file"]) as tar:
        data = tar.extractfile(tar.next()).read()  # type: ignore[union-attr, arg-type]
    columns = safetensors.numpy.load(data)
    for name, change in changes.items():
        columns[name] = change(columns[name].copy()) if callable(change) else change
    data = safetensors.numpy.save({name: value for name, value in columns.items() if value is not None})
    header = tarfile.TarInfo("block.safetensors")
    header.size = len(data) if size is None else size
    content = io.BytesIO()
    content.write(header.tobuf() + data + bytes(-len(data) % 512 + 1024))
    (folder / shard["file"]).write_bytes(content.getvalue())
    shard["bytes"], shard["block_crc32"] = len(content.getvalue()), [zlib.crc32(data)]
    (folder / "manifest.json").write_text(json.dumps(document))
    return BlockReader(folder, "train")


def at(index: Any, value: float):
    def change(column):
        column[index] = value
        return column

    return change


def small_cells(size: float):
    return lambda cell: np.where(np.abs(cell).sum(axis=(1, 2), keepdims=True) > 0, size * np.eye(3), cell)


BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": ({"n_atoms": lambda n: n + np.eye(1, len(n), dtype=n.dtype)[0]}, "do not add up to"),
    "negative sizes": ({"n_atoms": at(0, -1)}, "do not add up to"),
    "whole positions": ({"positions": lambda p: p.astype(np.int32)}, "its positions are of type int32"),
    "other precision": ({"forces": lambda f: f.astype(np.float64)}, "'forces' is of type float64"),
    "all in other precision": (
        {name: (lambda x: x.astype(np.float64)) for name in ("positions", "forces", "stress")},
        "positions of type float64, not float32",
    ),
    "real numbers": ({"numbers": lambda n: n.astype(np.float32)}, "'numbers' is of type float32"),
    "element 0": ({"numbers": at(0, 0)}, "not that of an element"),
    "element 119": ({"numbers": at(0, 119)}, "not that of an element"),
    "an element of no other": ({"numbers": at(0, 92)}, "an element that the manifest does not list"),
    "shape": ({"positions": lambda p: p.reshape(-1)}, "and shape"),
    "fewer": ({"energy": lambda e: e[:-1]}, "'energy' is of type float64 and shape"),
    "NaN position": ({"positions": at((3, 1), np.nan)}, "a position is NaN"),
    "NaN cell": ({"cell": at((0, 0, 0), np.nan)}, "a cell is NaN"),
    "infinite energy": ({"energy": at(0, np.inf)}, "an energy is infinite"),
    "NaN energy": ({"energy": at(0, np.nan)}, "lacks energy, which every structure has"),
    "force that is NaN in part": ({"forces": at((0, 0), np.nan)}, "forces of a structure are NaN in part"),
    "forces of an atom": ({"forces": at(0, np.nan)}, "forces of a structure are NaN in part"),
    "no forces": ({"forces": None}, "lacks forces"),
    "multiplicity": ({"multiplicity": at(0, -3)}, "a multiplicity is negative"),
    "charge": ({"charge": at(0, 3)}, "charges or multiplicities, which no structure has"),
    "a cell of 5e-4 Å": ({"cell": small_cells(5e-4)}, "length zero"),
    "a cell of 0.06 Å": ({"cell": small_cells(0.06)}, "no matter is denser"),
    "no cell": ({"cell": lambda cell: 0 * cell}, "length zero"),
    "names": ({"source_ids": at(slice(None), ord("x"))}, "1 source ids of"),
    "no UTF-8": ({"source_ids": at(0, 255)}, "not UTF-8"),
    "missing": ({"numbers": None}, "numbers"),
    "unknown": ({"further": np.zeros(3)}, "further"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_that_lies_is_refused(folder, case):
    changes, words = BLOCKS[case]
    reader = with_columns(folder, changes)
    with pytest.raises(ShardError, match=words):
        reader.read(0)


def test_an_unchanged_block_is_read(folder):
    assert len(with_columns(folder, {}).read(0)) == read_manifest(folder).structures("train")


@pytest.mark.parametrize("size", [10**12, 5 * 10**5])
def test_a_member_larger_than_its_place_is_not_read(folder, size):
    with pytest.raises(ShardError, match=r"is not at the place that the manifest gives|cannot be read"):
        with_columns(folder, {}, size).read(0)


def test_a_sparse_member_is_not_read(folder):
    """GNU tar says of a sparse file that a terabyte of zeros is in its place."""
    reader = with_columns(folder, {})
    path = folder / reader.manifest.splits["train"][0].file
    content = bytearray(path.read_bytes())
    content[156:157] = b"S"
    content[483:495] = b"%011o\0" % (8**11 - 1)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"is not at the place that the manifest gives|cannot be read"):
        reader.read(0)


@pytest.mark.parametrize(("size", "pbc"), [(0.06, (1, 1, 1)), (0.06, (1, 1, 0)), (5e-4, (1, 0, 0)), (0.3, (1, 1, 1))])
def test_a_structure_denser_than_any_matter_is_a_bad_frame(tmp_path, size, pbc):
    dense = Atoms("H", cell=[size] * 3, pbc=pbc)
    with pytest.raises(StructureError) as caught:
        check_structure(to_structure(dense))
    assert caught.value.reason in ("too_dense", "zero_cell")
    path = tmp_path / "dense.extxyz"
    write(path, [*metals(8), dense], format="extxyz")
    geometry = ReadSettings(fields=FieldNames(energy="", forces="", stress=""))
    errors = [frame.error for frame in read_frames(path, geometry) if frame.error is not None]
    assert [error.reason for error in errors] == [caught.value.reason]
    with pytest.raises(SourceError, match=r"denser|length zero"):
        convert([path], "t", tmp_path / "t", ConvertSettings())


def test_dense_structures_that_exist_are_read():
    check_structure(to_structure(Atoms("H", cell=[0.8] * 3, pbc=True)))  # 0.5 Å³, denser than the core of Jupiter
    chain = to_structure(Atoms("H", cell=[0.8, 0, 0], pbc=(1, 0, 0)))
    check_structure(chain)
    assert len(half_pairs(chain.positions, chain.cell, chain.pbc, 5.0).first) == 6


@pytest.mark.parametrize(
    ("cell", "cutoff", "reason"),
    [
        (np.eye(3) * 0.06, 5.0, "too_dense"),
        (np.eye(3) * 4.0, 1e9, "too_dense"),
        (np.diag([np.nan, 4.0, 4.0]), 5.0, "non_finite_positions"),
        (np.diag([np.inf, 4.0, 4.0]), 5.0, "non_finite_positions"),
        (np.zeros((3, 3)), 5.0, "too_dense"),
    ],
)
def test_a_search_for_neighbours_neither_hangs_nor_ends_the_process(cell, cutoff, reason):
    with pytest.raises(StructureError) as caught:
        half_pairs(np.zeros((1, 3)), cell, np.ones(3, dtype=bool), cutoff)
    assert caught.value.reason == reason
