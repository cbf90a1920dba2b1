"""Files that cannot be read or written, and JSON of another shape, are one sentence in every command."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from sources import molecules, write_extxyz
from test_older_files import FILES

from hydrazero.launch.cli.main import HydrazeroGroup, main
from hydrazero.launch.node.records import add_event, all_events
from hydrazero.models.screening.output import RECORD_NAME, ScreenOutput
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import check_writable, read_json, read_json_lines, replacing
from hydrazero.trainer.checkpoint.folders import best_checkpoint, damage
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, RUN_NAME, read_metrics, read_run_json
from hydrazero.trainer.records.task_errors import read_evaluation

DEEP = "[" * 200_000
RUN = FILES / "runs" / "zero1"


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result: Result, *words: str) -> None:
    """The command failed with one sentence that holds the words, on the last line."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert line.endswith(".") and all(word in line for word in words), line


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    convert([write_extxyz(folder / "a.xyz", molecules(40))], "t", folder / "t", load_convert_settings(None))
    return folder / "t"


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "SHARDS", "--html", "file/a.html"),
        ("subset", "SHARDS", "--train", "3", "--out", "file/a"),
        ("convert", "a.xyz", "--task", "t", "--out", "file/a"),
    ],
)
def test_folders_that_cannot_be_made_are_one_sentence(shards, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    write_extxyz(tmp_path / "a.xyz", molecules(40))
    (tmp_path / "file").touch()
    refused(command(*[str(shards) if word == "SHARDS" else word for word in words]), "file", "cannot be ")


def test_folders_that_may_not_be_written_are_found_first(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    check_writable(tmp_path / "run" / "a" / "b", "name another with --out")
    assert not (tmp_path / "run" / "a").exists()
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not mode & os.W_OK)
    with pytest.raises(ConfigError, match=r"written to the folder .*run; name another with --out\.$"):
        check_writable(tmp_path / "run" / "a" / "b", "name another with --out")
    refused(command("report", tmp_path / "run"), "nothing can be written to the folder", "name another file with --out")
    refused(command("init", tmp_path, "--out", tmp_path / "run" / "r.toml"), "nothing can be written", "--out")
    words = ("finetune", tmp_path / "m.safetensors", tmp_path, "--out", tmp_path / "run" / "r")
    refused(command(*words), "nothing can be written", "another run folder with --out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_errors_of_the_system_are_caught_once_for_all_commands(code):
    @click.group(cls=HydrazeroGroup)
    def group() -> None:
        pass

    @group.command("write")
    def write() -> None:
        raise OSError(code, os.strerror(code), "/data/report.html")

    @group.command("other")
    def other() -> None:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    result = CliRunner().invoke(group, ["write"])
    refused(result, "/data/report.html cannot be ", os.strerror(code))
    assert isinstance(CliRunner().invoke(group, ["other"]).exception, ConnectionResetError)  # about no file: a bug


def test_a_full_disk_names_the_file_whatever_library_writes(tmp_path, monkeypatch):
    def full(part: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def absent(part: Path) -> None:
        save_file({"a": torch.zeros(3)}, str(tmp_path / "none" / "x"))

    def arrow(part: Path) -> None:
        text = "Error writing bytes to file. Detail: [errno 28] No space left on device"  # as Arrow says it
        raise OSError(errno.ENOSPC, text)

    cases = ((full, errno.ENOSPC), (absent, errno.ENOENT), (arrow, errno.ENOSPC))
    for write, code in cases:
        with pytest.raises(OSError) as error, replacing(tmp_path / "out.bin") as part:
            write(part)
        assert error.value.errno == code and error.value.strerror == os.strerror(code)
        assert error.value.filename == str(tmp_path / "out.bin") and not list(tmp_path.iterdir())


def test_an_error_that_is_not_of_the_system_passes_through(tmp_path):
    with pytest.raises(RuntimeError, match="errors of others"), replacing(tmp_path / "x"):
        raise RuntimeError("errors of others")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\xff", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (DEEP.encode(), "is not valid JSON: it is nested too deeply; look there."),
        (b"[" * 900, "is not valid JSON"),
        (b"9" * 6000, "is not valid JSON"),
        (b"[1, 2]", r"has other content than it should have \(its top level: input should be a valid dictionary\)"),
        (b'{"a": "b"}', r"has other content .* \(a: input should be a valid integer"),
    ],
)
def test_json_of_another_shape(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"x\.json {words}"):
        read_json(path, shape=dict[str, int], hint="look there")
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path, shape=dict[str, int]) == {"a": 1}
    path.write_text('{"a": 1}', encoding="utf-16")
    assert read_json(path) == {"a": 1}


def test_lines_of_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train", "loss": 0.5}\n{"step": 2, "ki')
    assert read_metrics(tmp_path) == [{"step": 1, "kind": "train", "loss": 0.5}]  # its writer is at work
    wrong = ("[]", '{"step": -1, "kind": "train"}', '{"step": 1}', '{"step": 1, "kind": "a", "loss": "x"}', "{", DEEP)
    for line in wrong:
        path.write_text(f'{{"step": 1, "kind": "train"}}\n{line}\n')
        with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2, (is not valid JSON|has other content)"):
            read_metrics(tmp_path)
    path.write_bytes(b'\xff"\n')
    with pytest.raises(ConfigError, match=r"line 1, is not valid JSON"):
        read_json_lines(path)


def places(document: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        inner = list(document.items())
    elif isinstance(document, list):
        inner = list(enumerate(document[:2]))
    return [place, *(each for key, value in inner for each in places(value, (*place, key)))]


def altered(text: str, place: tuple[Any, ...], value: Any) -> Any:
    """Return a document in which the value at a place is another one, or is removed if it is `...`."""
    if not place:
        return None if value is ... else value
    document = json.loads(text)
    at = document
    for key in place[:-1]:
        at = at[key]
    if value is ...:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return document


@pytest.mark.parametrize("name", [RUN_NAME, MODEL_FACTS_NAME, "evaluation.json"])
def test_altered_files_of_a_run_are_read_or_refused(tmp_path, name):
    text = (RUN / name).read_text()
    path = tmp_path / name
    random.seed(0)
    refusals = 0
    for place in places(json.loads(text)):
        for value in random.sample([..., None, 5, "x", [], {}, [1], {"a": 1}, True], 3):
            path.write_text(json.dumps(altered(text, place, value)))
            try:
                read_evaluation(path) if name == "evaluation.json" else read_run_json(tmp_path, name)
            except ConfigError as error:
                refusals += name in str(error)
    assert refusals > 10
    path.write_text(text)
    assert read_evaluation(path).tasks if name == "evaluation.json" else read_run_json(tmp_path, name)


def test_other_records_of_other_shapes(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    for text in ("[]", '{"step": "three"}', "{}", DEEP):
        (tmp_path / "checkpoints" / "best.json").write_text(text)
        with pytest.raises(ConfigError, match=r"best\.json"):
            best_checkpoint(tmp_path)
        (folder / "checksums.json").write_text(text if "three" not in text else '{"a": 5}')
        assert "checksums.json" in str(damage(folder))
    screen = ScreenOutput(tmp_path / "s")
    (tmp_path / "s").mkdir()
    for text in ("[]", "5", '{"settings": []}', DEEP):
        (tmp_path / "s" / RECORD_NAME).write_text(text)
        with pytest.raises(ConfigError, match=r"_screen\.json .*; remove the folder to begin anew"):
            screen.begin({"settings": {}}, 1)


def test_damaged_lines_of_the_records_of_a_job_are_skipped(tmp_path):
    add_event(tmp_path, "n1", "start", rank=0, ranks=2)
    with open(tmp_path / "n1.jsonl", "a", encoding="utf-8") as file:
        file.write('[]\n5\n{"event": "end"}\n{"event": "start", "time": "x", "node": 1}\n{"half\n' + DEEP + "\n")
    assert [row["event"] for row in all_events(tmp_path)] == ["start"]
