"""Compressed files, byte order marks and other encodings: read, or one sentence that says what to do."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from format_files import COLUMNS, frames, n2p2_text, pymatgen_entry, samples, write_hdf5
from sources import metals, molecules, write_extxyz

from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers import ReadSettings, find_sources
from hydrazero.trainer.config.run_file import load_run_config

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def packed(path: Path, suffix: str) -> Path:
    """Compress a file, remove the plain one, and return the compressed one."""
    out = path.with_name(path.name + suffix)
    if suffix == ".zip":
        with zipfile.ZipFile(out, "w") as archive:
            archive.write(path, path.name)
            archive.writestr("__MACOSX/._x", "hidden")
    else:
        with OPENERS[suffix](out, "wb") as file:
            file.write(path.read_bytes())
    path.unlink()
    return out


def write(folder: Path, kind: str) -> tuple[Path, dict[str, object]]:
    """Write a file of a kind with three frames; return it with the settings that read it."""
    atoms, path = samples(), folder / f"a.{kind}"
    if kind == "npz":
        z, r = atoms[0].numbers, np.array([atoms[0].positions] * 3)
        np.savez(path, z=z, R=r, E=np.arange(3.0), F=np.zeros_like(r))
    elif kind == "h5":
        write_hdf5(path, atoms)
        return path, {"columns": {**COLUMNS, "ptr": "data/first"}}
    elif kind == "db":
        with ase.db.connect(str(path)) as database:
            for each in atoms:
                database.write(each)
    elif kind == "json":
        path.write_text(json.dumps([pymatgen_entry(each) for each in atoms]))
    elif kind == "xyz":
        write_extxyz(path, atoms)
    else:
        ase.io.write(path, atoms)
    return path, {}


@pytest.mark.parametrize("kind", ["npz", "h5", "traj", "db", "xyz", "json"])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zip"])
def test_compressed_files_are_read(tmp_path, kind, suffix):
    path, settings = write(tmp_path, kind)
    plain = frames(path, **settings)
    path = packed(path, suffix)
    found = frames(path, **settings)
    assert [frame.source_id.removeprefix(f"a.{kind}{suffix}#") for frame in found] == [
        frame.source_id.removeprefix(f"a.{kind}#") for frame in plain
    ]
    for frame, other in zip(found, plain, strict=True):
        assert frame.structure is not None and other.structure is not None
        assert frame.structure.energy == other.structure.energy
        np.testing.assert_array_equal(frame.structure.positions, other.structure.positions)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError) as error:
        frames(path, **settings)
    assert str(path) in str(error.value) and "pickle" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.lmdb.gz", r"a\.lmdb\.gz is compressed, and its format is read in place; unpack it first"),
        ("a.xyz.zst", r"is compressed in a way that is not read; unpack it \(unzstd a\.xyz\.zst\), and name"),
        ("a.tar.zst", r"unzstd a\.tar\.zst"),
        ("a.7z", r"7z x a\.7z"),
    ],
)
def test_compressions_that_are_not_read_are_named_with_the_command_that_unpacks(tmp_path, name, words):
    (tmp_path / name).write_bytes((b"\x1f\x8b\x08\x00" if name.endswith(".gz") else b"\x28\xb5\x2f\xfd") * 9)
    with pytest.raises(SourceError, match=words) as error:
        frames(tmp_path / name)
    assert "pickle" not in str(error.value)


def test_an_archive_of_several_files_is_unpacked_by_the_user(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.xyz", "x")
        archive.writestr("b.xyz", "x")
    with pytest.raises(SourceError, match=r"a\.zip holds 2 files; unpack it \(unzip a\.zip -d FOLDER\)"):
        frames(tmp_path / "a.zip")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("kind", ["xyz", "json", "data"])
def test_byte_order_marks_of_data_are_read(tmp_path, kind, encoding, suffix):
    path = tmp_path / f"a.{kind}"
    if kind == "data":
        path.write_text("".join(n2p2_text(each, -1.0) for each in samples()))
    else:
        write(tmp_path, kind)
    plain = frames(path)
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    path.write_bytes(mark + path.read_text().encode(encoding))
    found = frames(path if not suffix else packed(path, suffix))
    assert len(found) == 3 and not any(frame.error for frame in found)
    assert [frame.structure.energy for frame in found] == [frame.structure.energy for frame in plain]


def test_byte_order_marks_of_settings_are_read(tmp_path):
    path = tmp_path / "s.toml"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes('[fields]\nenergy = "E0"\n'.encode(encoding))
        assert load_convert_settings(path).fields.energy == "E0"
        path.write_bytes('[run]\nout = "r"\n[[tasks]]\nname = "a"\nshards = "s"\n[train]\nsteps = 3\n'.encode(encoding))
        assert load_run_config(path).run.out == "r"


def test_another_encoding_is_one_sentence_with_the_position(tmp_path):
    path = write_extxyz(tmp_path / "a.xyz", molecules(200))
    lines = path.read_bytes().split(b"\n")
    lines[-5] = lines[-5].replace(b"\xc3", b"") + b"\xc5"
    text = b"\n".join(lines)
    path.write_bytes(text)
    words = rf"a\.xyz: the byte 0xc5 at position {text.index(0xC5):,} \(after .*\) is not UTF-8, .* perhaps Latin-1"
    with pytest.raises(SourceError, match=words):
        frames(path)
    with pytest.raises(SourceError, match=words.replace(r"a\.xyz:", r"a\.xyz\.gz:")):
        frames(packed(path, ".gz"))


def test_compressed_files_in_folders(tmp_path):
    for name in ("a.xyz", "b.xyz"):
        write_extxyz(tmp_path / name, metals(2))
    one, two = packed(tmp_path / "a.xyz", ".gz"), packed(tmp_path / "b.xyz", ".zip")
    (tmp_path / "c.xyz.zst").write_bytes(b"x")
    found = find_sources([tmp_path], ReadSettings())
    assert found.files == (one, two) and found.not_read[0].endswith("was not read: c.xyz.zst.")


@pytest.mark.parametrize(("suffix", "name"), [(".gz", "gzip"), (".bz2", "bzip2"), (".xz", "xz"), (".zip", "zip")])
def test_a_text_with_the_suffix_of_a_compression(tmp_path, suffix, name):
    path = tmp_path / f"a.xyz{suffix}"
    path.write_text("1\nenergy=-1\nCu 0 0 0\n")
    with pytest.raises(SourceError, match=f"is not {name}-compressed, although its name ends in {suffix}; rename it"):
        frames(path)


@pytest.mark.parametrize("name", ["README.md", "a.foo"])
def test_files_with_unknown_suffixes(tmp_path, name):
    path = tmp_path / name
    path.write_text("# Data\n\nText.\n")
    with pytest.raises(SourceError, match=rf"its suffix \{path.suffix} is not known; name the format with --format"):
        frames(path)


def test_repeated_control_characters_are_shown_once(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_bytes(b"\0" * 60)
    with pytest.raises(SourceError, match="frame 0: '\\\\x00…' is not a number of atoms"):
        frames(path)
