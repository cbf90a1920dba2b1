"""Sources that are damaged or odd in ways that no reader library reports well."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from click.testing import CliRunner, Result
from sources import molecules, write_extxyz

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings, SplitSection
from hydrazero.shards.convert.writer import write_shard
from hydrazero.shards.errors import ConfigError, SourceError, StructureError
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.readers import ReadSettings, read_frames
from hydrazero.shards.readers.frames import brief
from hydrazero.shards.readers.parts.geometry import numbers_in


def refused(source: Path, out: Path, *, words: tuple[str, ...], config: str = "") -> None:
    """The conversion ends with one sentence that holds the words, and leaves no folder."""
    settings = out.parent / "settings.toml"
    settings.write_text(config)
    command = ["convert", str(source), "--task", "t", "--out", str(out), "--config", str(settings)]
    result: Result = CliRunner().invoke(main, command)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not out.exists() and not list(out.parent.glob(f".{out.name}.part*"))


def archive(path: Path, **changes: Any) -> Path:
    positions = np.array([[[0, 0, 0], [0, 0, 1 + 0.01 * n]] for n in range(30)], dtype=float)
    arrays = {"z": np.array([8, 1]), "R": positions, "E": np.arange(30.0), "F": np.zeros((30, 2, 3)), **changes}
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"z": np.array(["O", "Xx"])}, ("frame 0", "'Xx' is not a chemical element")),
        ({"z": np.array([8.0, 1.5])}, ("frame 0", "atomic number 1.5")),
        ({"z": np.array([8, 300])}, ("frame 0", "atomic number 300")),
        ({"z": np.array([[8, 1]] * 29)}, ("'z' has shape (29, 2)", "30 frames of 2 atoms need (30, 2)")),
        ({"z": None}, ("E, F", "sGDML")),
        ({"R": np.array(5.0)}, ("'R' has shape ()",)),
        ({"R": np.zeros((30, 6))}, ("'R' has shape (30, 6)",)),
        ({"E": np.array(5.0)}, ("'E' has shape ()",)),
        ({"E": np.arange(29.0)}, ("'E' has shape (29,)",)),
        ({"E": None}, ("frame 0", "no energy")),
        ({"F": np.array([None] * 30, dtype=object)}, ("holds arrays of Python objects", "not read")),
    ],
)
def test_odd_archives(tmp_path, changes, words):
    refused(archive(tmp_path / "a.npz", **changes), tmp_path / "out", words=("a.npz", *words))


def test_an_archive_damaged_anywhere_is_named(tmp_path):
    path = archive(tmp_path / "a.npz")
    whole = path.read_bytes()
    found = 0
    for place in range(0, len(whole) - 8, 61):
        damaged = bytearray(whole)
        damaged[place : place + 8] = bytes(byte ^ 0xFF for byte in damaged[place : place + 8])
        path.write_bytes(bytes(damaged))
        try:
            list(read_frames(path, ReadSettings()))
        except SourceError as error:
            assert "a.npz" in str(error)
            found += 1
    assert found > 5


HEADER = "Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0"


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        (HEADER + " charge=1e9", "H 0 0 0 0 0 0", ("charge is 1e+09",)),
        (HEADER + " multiplicity=1e300", "H 0 0 0 0 0 0", ("multiplicity is 1e+300",)),
        (HEADER + " charge=0.5", "H 0 0 0 0 0 0", ("charge is 0.5",)),
        (HEADER, "H 0 0 0 1e39 0 0", ("force on atom 0", "above 1e+10")),  # infinite as float32
        (HEADER, "H 1e30 0 0 0 0 0", ("position", "above 1e+10")),
    ],
)
def test_values_that_shards_cannot_hold(tmp_path, header, row, words):
    source = tmp_path / "a.xyz"
    source.write_text(f"1\n{header}\n{row}\n")
    refused(source, tmp_path / "out", words=("a.xyz, frame 0", *words))


@pytest.mark.parametrize("count", ["30000000", "9" * 30, "-4"])
def test_a_damaged_count_of_atoms(tmp_path, count):
    source = tmp_path / "a.xyz"
    source.write_text(f"1\n{HEADER}\nH 0 0 0 0 0 0\n{count}\n{HEADER}\nH 0 0 1 0 0 0\n")
    words = "truncated" if int(count) > 0 else "not a number of atoms"
    refused(source, tmp_path / "out", words=("a.xyz, frame 1", words))


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "frame 5: 'H 0 0 1 0 0 0' is not a number of atoms; perhaps that of frame 4 is wrong."),
        (
            3,
            "frame 4: the line of atom 2 has 1 word, but the Properties name 7 columns; perhaps the number of atoms in",
        ),
    ],
)
def test_a_count_of_atoms_that_is_wrong_by_one(tmp_path, count, words):
    source = tmp_path / "a.xyz"
    frames = [f"{count if n == 4 else 2}\n{HEADER}\nH 0 0 0 0 0 0\nH 0 0 1 0 0 0\n" for n in range(6)]
    source.write_text("".join(frames))
    refused(source, tmp_path / "out", words=(words,))


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        (
            "energy=********",
            "H 0 0 0 0 0 0",
            "the energy cannot be read as numbers: '********' is not a number; correct",
        ),
        (
            "energy=-1 charge=one",
            "H 0 0 0 0 0 0",
            "the charge cannot be read as numbers: 'one' is not a number; correct",
        ),
        (
            "energy=-1",
            "H 0 0 0 0 ******** 0",
            "in the line of atom 0, '********' is not a number; correct the frame, or",
        ),
        (
            'energy=-1 pbc="T T F',
            "H 0 0 0 0 0 0",
            "the comment line has \" after 'pbc=' without its other half; correct the frame, or",
        ),
    ],
)
def test_text_in_place_of_a_number_is_shown_without_python(tmp_path, header, row, words):
    source = tmp_path / "a.xyz"
    source.write_text(f"1\n{HEADER.removesuffix(' energy=-1.0')} {header}\n{row}\n")
    refused(source, tmp_path / "out", words=(f"a.xyz, frame 0: {words}",))


def test_what_python_says_of_a_text_that_is_no_number():
    for value, words in (("1.2.3", "'1.2.3' is not a number"), (np.str_("a'b"), "'a'b' is not a number")):
        with pytest.raises(ValueError) as error:
            np.array([value], dtype=object).astype(np.float64) if isinstance(value, str) else float(value)
        assert brief(error.value) == words
    with pytest.raises(ValueError) as error:
        int("x")
    assert brief(error.value) == "'x' is not a whole number" and brief(ValueError()) == "ValueError"
    ragged = [[1.0, 2.0], [3.0]]
    with pytest.raises(StructureError, match="the forces cannot be read as numbers: its parts have different shapes"):
        numbers_in(ragged, "forces")


def test_settings_that_leave_nothing(tmp_path):
    frames = molecules(8)
    for atoms in frames:
        atoms.info["T"] = 300
    source = write_extxyz(tmp_path / "t.xyz", frames)
    refused(source, tmp_path / "out", config='[select]\nT = ["MD", 200]\n', words=("skipped", "not_selected: 8"))
    missing = "no frame has the field 'config_type' of [select]; the frames have T"
    refused(source, tmp_path / "out", config='[select]\nT = [300]\nconfig_type = ["MD"]\n', words=(missing,))
    refused(source, tmp_path / "out", config="[split]\nseed = -1\n", words=("split.seed is -1",))


def test_an_empty_folder_is_no_source(tmp_path):
    folder = tmp_path / "frames.xyz"
    folder.mkdir()
    refused(folder, tmp_path / "out", words=("frames.xyz holds no file",))


def test_an_at_sign_in_a_file_name_is_no_selection(tmp_path):
    path = tmp_path / "run@2.traj"
    ase.io.write(tmp_path / "plain.traj", molecules(5))
    os.replace(tmp_path / "plain.traj", path)
    assert len(list(read_frames(path, ReadSettings()))) == 5


def test_files_of_one_name_in_two_folders_stay_apart(tmp_path):
    paths = []
    for number in range(12):
        folder = tmp_path / f"element{number}"
        folder.mkdir()
        paths.append(write_extxyz(folder / "data.xyz", molecules(4, seed=number)))
    settings = ConvertSettings(split=SplitSection(group="file", train=0.5, val=0.25, test=0.25))
    manifest = convert([*paths, paths[0]], "t", tmp_path / "out", settings)
    assert all(manifest.structures(split) % 4 == 0 for split in ("val", "test"))
    assert 0 < manifest.structures("val") < 48 and 0 < manifest.structures("test") < 48
    assert manifest.duplicates[0] == "element0/data.xyz#0 = element0/data.xyz#0"  # the same file, given twice
    assert "element11/data.xyz" in read_manifest(tmp_path / "out").source["files"]


def test_mixed_units_in_one_source(tmp_path):
    frames = molecules(40)
    for number, atoms in enumerate(frames):
        atoms.info["total"] = -2040.0 - 0.01 * number  # the size of total energies, in eV
        if number >= 24:
            atoms.info["total"] /= 27.211386
    source = write_extxyz(tmp_path / "mixed.xyz", frames)
    config = '[fields]\nenergy = "total"\n'
    refused(source, tmp_path / "out", config=config, words=("mixed.xyz#0", "mixed.xyz#24", "eV and Hartree"))
    refused(source, tmp_path / "out", config=config + "[split]\nval = 0.3\n", words=("add up to 1",))
    write_extxyz(source, frames[:24])
    (tmp_path / "settings.toml").write_text(config)
    options = ["--task", "t", "--out", str(tmp_path / "out"), "--config", str(tmp_path / "settings.toml")]
    assert CliRunner().invoke(main, ["convert", str(source), *options]).exit_code == 0


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, kind):
    source = write_extxyz(tmp_path / "a.xyz", molecules(40))

    def full(path: Path, *more: Any) -> Any:
        if path.name.startswith("val"):
            raise kind(28, "No space left on device")
        return write_shard(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr("hydrazero.shards.convert.shards.write_shard", full)
        with pytest.raises((KeyboardInterrupt, ConfigError), match=r"No space left"):
            convert([source], "t", tmp_path / "out", ConvertSettings())
    assert not (tmp_path / "out").exists()
    convert([source], "t", tmp_path / "out", ConvertSettings())
    assert read_manifest(tmp_path / "out").structures() == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.xyz", "out"]
