"""Files that are complete or absent, locks that end with their process, and readable errors of JSON and TOML."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib

import pytest

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import (
    locked,
    read_json,
    read_toml,
    replacing,
    toml_text,
    try_lock,
    write_bytes,
    write_json,
    write_text,
)

HOLD = """
import sys, time
from pathlib import Path
from hydrazero.shards.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"durable": True}, {"suffix": ".pt2"}])
def test_a_file_keeps_its_content_until_the_new_one_is_complete(tmp_path, options):
    path = tmp_path / "model.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path, **options) as part:
        part.write_text("half")
        assert part.name.endswith(options.get("suffix", "")) and part.parent == tmp_path
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["model.json"]
    with replacing(path, **options) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["model.json"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "out", shared=True) as part:
        part.mkdir()
        (part / "a").touch()
        raise RuntimeError
    assert not os.listdir(tmp_path)
    with replacing(tmp_path / "out") as part:
        part.mkdir()
        (part / "a").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


def test_texts_bytes_and_json_read_back(tmp_path):
    write_text(tmp_path / "a", "Å\r\n")
    write_bytes(tmp_path / "b", b"\r\n", durable=True)
    write_json(tmp_path / "c", {"of": ["Å", None]}, shared=True)
    assert (tmp_path / "a").read_bytes() == "Å\r\n".encode() and (tmp_path / "b").read_bytes() == b"\r\n"
    assert read_json(tmp_path / "c") == {"of": ["Å", None]} and sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_lock_keeps_others_out_until_its_process_is_killed(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert try_lock(path) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = try_lock(path)
    assert held is not None and try_lock(path) is None  # nor may the same process take it twice
    with held:
        pass
    with locked(path, remove=True):
        assert path.exists() and try_lock(path) is None
    assert not path.exists()


def test_a_lock_that_cannot_be_had_is_one_sentence(tmp_path):
    (tmp_path / "a").touch()
    with (
        pytest.raises(ConfigError, match=r"a/lock cannot be locked \(.*\); choose a folder"),
        locked(tmp_path / "a/lock"),
    ):
        pass


def test_files_that_cannot_be_read_are_one_sentence(tmp_path):
    path = tmp_path / "x"
    for read in (read_toml, read_json):
        with pytest.raises(ConfigError, match=r"^run file .*/x cannot be read \(No such file or directory\)\.$"):
            read(path, "run file")
    with pytest.raises(ConfigError, match=r"^/.*/x cannot be read \(No such file or directory\); look elsewhere\.$"):
        read_json(path, hint="look elsewhere")
    path.write_text("a = 1\nb = [")
    with pytest.raises(ConfigError, match=r"^run file .*/x is not valid TOML: .*(line 2|end of document)"):
        read_toml(path, "run file")
    with pytest.raises(ConfigError, match=r"^.*/x is not valid JSON: .*line 1 column 1"):
        read_json(path)
    path.write_bytes(b"\xff")
    for read, kind in ((read_toml, "TOML"), (read_json, "JSON")):
        with pytest.raises(ConfigError, match=f"is not valid {kind}"):
            read(path, "run file")


def test_tables_are_written_as_toml_with_their_comments():
    table = {"run": {"out": 'a "b"'}, "tasks": [{"name": "t", "share": 0.5}], "deepspeed": {"optimizer": {"lr": 1e-5}}}
    text = toml_text(table, ["First line.", "Second line."])
    assert text.startswith("# First line.\n# Second line.\n\n[run]\n") and tomllib.loads(text) == table
    with pytest.raises(ConfigError, match="cannot be written as TOML"):
        toml_text({"run": {"out": None}})
