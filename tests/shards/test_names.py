"""Names in files of others: they name regular files inside their folder, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from sources import make_shards, molecules

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.shards import ShardNote, _read_note, _written_note
from hydrazero.shards.convert.task_statistics import Statistics
from hydrazero.shards.errors import ConfigError, HydrazeroError, ShardError
from hydrazero.shards.files import locked, read_json, replacing
from hydrazero.shards.location import ShardCommand, address, is_remote
from hydrazero.shards.manifest import check_shard_files, read_manifest
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.text.names import is_name, path_fault

GOOD = ("qm9", "train-000000.tar", "a b", "MoS₂", "water (PBE)", "a<b>", "$x$", "_x", "x" * 200)
BAD = (
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "../x",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\nb",
    "a\x1b[31m",
    "a\ud800",
    " a",
    "a ",
)


def hydrazero(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 1 and result.output.count("Error: ") == 1, result.output
    return result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("names"), "molecules", molecules(60))


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def change(folder: Path, **values: object) -> None:
    """Change the manifest, and the first shard of the training split where a value begins with `shard_`."""
    document = json.loads((folder / "manifest.json").read_text())
    for key, value in values.items():
        table = document["splits"]["train"][0] if key.startswith("shard_") else document
        table[key.removeprefix("shard_")] = value
    (folder / "manifest.json").write_text(json.dumps(document))


def test_what_is_a_name():
    assert [name for name in GOOD if not is_name(name)] == []
    assert [name for name in (*BAD, "x" * 201, 7, None) if is_name(name)] == []


@pytest.mark.parametrize("name", [*BAD, "../shards/train-000000.tar"])
def test_names_in_manifests(shards, name):
    for key in ("task", "shard_file"):
        shutil.copy(shards / "manifest.json", shards / "before.json")
        change(shards, **{key: name})
        assert str(shards) in hydrazero("inspect", shards)
        with pytest.raises(ShardError):
            BlockReader(shards, "train")
        shutil.move(shards / "before.json", shards / "manifest.json")


def test_offsets_that_are_commands(shards, tmp_path):
    change(shards, shard_block_offsets=[f"0; touch {tmp_path}/made", 1])
    with pytest.raises(ShardError):
        read_manifest(shards)
    assert not (tmp_path / "made").exists()


def test_shards_are_regular_files_of_their_folder(shards, tmp_path):
    shard, outside = shards / "train-000000.tar", tmp_path / "outside.tar"
    manifest = read_manifest(shards)
    shutil.move(shard, outside)
    shard.symlink_to(outside)
    with pytest.raises(ShardError, match="is a symbolic link that leads out of its folder"):
        check_shard_files(manifest, shards)
    with pytest.raises(ShardError, match="symbolic link that leads out"):
        BlockReader(shards, "train").read(0)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ShardError, match="is not a regular file"):
        check_shard_files(manifest, shards)
    with pytest.raises(ShardError, match="is not a regular file"):
        BlockReader(shards, "train").read(0)
    shard.unlink()
    shutil.move(outside, shards / "elsewhere.tar")
    shard.symlink_to("elsewhere.tar")  # inside
    check_shard_files(manifest, shards)
    linked = tmp_path / "linked"
    linked.symlink_to(shards)
    assert len(BlockReader(linked, "train").read(0)) > 0
    os.replace(shards / "manifest.json", tmp_path / "manifest.json")
    os.mkfifo(shards / "manifest.json")
    with pytest.raises(ShardError, match=r"manifest\.json"):
        read_manifest(shards)


def test_faults_of_paths(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("")
    assert path_fault(tmp_path, "a/file") is None
    assert path_fault(tmp_path, "a") == "is not a regular file"
    assert path_fault(tmp_path, "b") == "is missing"
    assert "is not a name of a file" in str(path_fault(tmp_path / "a", "../a/file"))


def test_commands_are_no_text(tmp_path):
    text = f"pipe:touch {tmp_path}/made; cat {{}}"
    reads = (is_remote, read_manifest, lambda place: BlockReader(place, "train"), lambda place: address(place, "x"))
    for read in reads:
        for place in (text, Path(text), f" {text}"):
            with pytest.raises(ConfigError, match="only for the tasks of a run file that you start yourself"):
                read(place)
    for words in (
        ("inspect", text),
        ("init", text, "--out", tmp_path / "run.toml"),
        ("subset", text, "--out", tmp_path / "part"),
    ):
        assert "a command (pipe:) is run only for" in hydrazero(*words)
    assert not (tmp_path / "made").exists()
    command = ShardCommand(line="cat {}")
    assert address(command, "a b.tar") == "cat 'a b.tar'" and str(command) == "pipe:cat {}"
    for name in BAD:
        with pytest.raises(ConfigError):
            address(command, name)


def test_addresses_are_quoted():
    assert address("http://host/x", "a b&c.tar") == "http://host/x/a%20b%26c.tar"
    for place in ("file:///etc", "ftp://host", "scp://host", "HTTP://host"):
        assert not is_remote(place)


def test_locks_and_temporary_files_do_not_follow_links(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    lock = tmp_path / "lock"
    lock.symlink_to(precious)
    with pytest.raises(HydrazeroError, match="lock"), locked(lock):
        pass
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(HydrazeroError, match="lock"), locked(lock):
        pass
    (tmp_path / ".out.part").symlink_to(precious)
    with replacing(tmp_path / "out") as part:
        part.write_text("new")
    assert (tmp_path / "out").read_text() == "new" and precious.read_text() == "kept"
    os.mkfifo(tmp_path / "document.json")
    with pytest.raises(ConfigError, match=r"document\.json is not a regular file"):
        read_json(tmp_path / "document.json")


def test_notes_hold_all_statistics_exactly(made):
    shard = read_manifest(made).splits["train"][0]
    statistics = Statistics()
    for block in (BlockReader(made, "train").read(0), BlockReader(made, "val").read(0)):
        statistics.add(block, "train", (4.0, 5.5), [])
    path = made.parent / "note.safetensors"
    path.write_bytes(_written_note(ShardNote(shard=shard, statistics=statistics)))
    read = _read_note(path)
    assert read is not None and read.shard == shard
    for name, value in vars(statistics).items():
        again = getattr(read.statistics, name)
        assert type(again) is type(value) and (
            np.array_equal(again, value) if isinstance(value, np.ndarray) else again == value
        ), name
    path.write_bytes(b"cbuiltins\nprint\n(Vhello\ntR.")
    assert _read_note(path) is None


def hdf5(path: Path, change: str, outside: Path) -> Path:
    """Write a file of two frames, of which one part is somewhere else."""
    with h5py.File(path, "w") as file:
        file["numbers"], file["positions"] = np.full(4, 1), np.arange(12.0).reshape(4, 3)
        file["n_atoms"], file["energy"] = np.array([2, 2]), np.zeros(2)
        file["forces"] = np.zeros((4, 3))
        group = file.create_group("g")
        group["numbers"], group["positions"] = np.array([1, 1]), np.arange(6.0).reshape(2, 3)
        group["energy"], group["forces"] = -1.0, np.zeros((2, 3))
        for place in (file, group):
            del place["energy"]
            if change == "link":
                place["energy"] = h5py.ExternalLink(str(outside), "energy")
            elif change == "path":
                place["energy"] = h5py.SoftLink("/elsewhere/energy")
            elif change == "storage":
                place.create_dataset("energy", (2,) if place is file else (), "f8", external=[(str(outside), 0, 16)])
            else:
                layout = h5py.VirtualLayout((2,), "f8")
                layout[:] = h5py.VirtualSource(str(outside), "energy", (2,))
                place.create_virtual_dataset("energy", layout)
        if change == "path":
            file["elsewhere"] = h5py.ExternalLink(str(outside), "/")
    return path


@pytest.mark.parametrize("change", ["link", "path", "storage", "virtual"])
@pytest.mark.parametrize("name", ["hdf5", "hdf5_groups"])
def test_hdf5_files_do_not_lead_elsewhere(tmp_path, change, name):
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["energy"] = np.array([-1.0, -2.0])
    path = hdf5(tmp_path / "file.h5", change, outside)
    for at_hand in (True, False):
        if not at_hand:  # to open a pipe would wait for ever
            outside.unlink()
            os.mkfifo(outside)
        for words in (("--format", name), ()):
            said = hydrazero("convert", path, *words, "--task", "t", "--out", tmp_path / "out")
            assert "which is not followed; copy" in said or "which is not read; copy" in said, said
