"""Texts of files on terminals, in plots and on pages: control characters, markup, formulas, names that are no text."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from run_files import write_small_run
from sources import make_shards, molecules, write_extxyz
from structures import small_model

from hydrazero.launch.cli.main import main
from hydrazero.models import save_model
from hydrazero.models.inference.model_card import Origin
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.text.foreign_text import HIDDEN, escaped, escaped_json, escaped_lines, for_html, for_plot
from hydrazero.shards.text.terminal import PlainConsole
from hydrazero.trainer.plots.panels import nothing, plain_axes

NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m[bold red]:warning: $\\frac{$ <script>alert(1)</script> \u202egpj.exe \r end"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m[bold red]:warning: $\\frac{$ <script>alert(1)</script> \\u202egpj.exe"


def hydrazero(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "300"})


def check_plain(text: str, *breaks: str) -> None:
    hidden = {letter for letter in text if unicodedata.category(letter) in HIDDEN}
    assert hidden <= {"\n", "\t", *breaks}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("texts"), "molecules", molecules(60))


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """Shards whose manifest has such a text wherever it may have one."""
    folder = Path(shutil.copytree(made, tmp_path / "shards"))
    document = json.loads((folder / "manifest.json").read_text())
    document["source"] |= {"method": NASTY, NASTY: "x"}
    document["set_aside"] = {NASTY: 3}
    document["duplicates"], document["duplicate_count"] = [f"{NASTY} = a"], 1
    for outliers in document["outliers"].values():
        outliers[0]["source_id"] = NASTY
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


def test_functions():
    assert escaped(NASTY).startswith(SHOWN) and escaped("a\nb\ud800") == "a\\nb\\ud800"
    assert escaped("Å³ µB 水") == "Å³ µB 水"
    assert escaped_lines("a\n\tb\x1b") == "a\n\tb\\x1b"
    assert for_html("<b>\x1b</b>") == "&lt;b&gt;\\x1b&lt;/b&gt;" and for_html('"') == "&quot;"
    document = {"a": f"{NASTY}\ud800", "b": "𝄞 Å"}
    text = escaped_json(json.dumps(document, ensure_ascii=False, indent=1))
    assert json.loads(text) == document and "𝄞 Å" in text
    check_plain(text)
    figure = Figure()
    axes = plain_axes(figure.add_subplot())
    nothing(axes, NASTY)
    axes.set_title(for_plot(NASTY))
    figure.canvas.draw()
    assert axes.title.get_text().count("\\$") == 2


def test_consoles(capsys):
    from rich.table import Table

    table = Table(title=NASTY)
    table.add_column(NASTY)
    table.add_row(NASTY)
    console = PlainConsole(width=300)
    console.print(table)
    console.print(NASTY)
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 4
    check_plain(printed)


def test_inspect_shows_what_a_manifest_says(shards, tmp_path):
    shown = hydrazero("inspect", shards)
    assert shown.exit_code == 0 and shown.output.count(SHOWN) >= 4, shown.output
    check_plain(shown.output)
    as_json = hydrazero("inspect", shards, "--json")
    assert as_json.exit_code == 0
    check_plain(as_json.output)
    page = tmp_path / "page.html"
    result = hydrazero("inspect", shards, "--html", page)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    check_plain(text)


def test_cards_of_models(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(small_model(), path, origin=Origin(run=NASTY, no_errors="\x1b[31mred"))
    shown = hydrazero("inspect", path)
    assert shown.exit_code == 0 and "\\x1b]0;owned" in shown.output and "\\x1b[31mred" in shown.output
    check_plain(shown.output)
    as_json = hydrazero("inspect", path, "--json")
    assert json.loads(as_json.output)["no_errors"] == "\x1b[31mred"
    check_plain(as_json.output)


def test_errors_are_one_line(tmp_path):
    out = ("--task", "t", "--out", tmp_path / "o")
    for words in (("inspect", f"{tmp_path}/\x1b[31m\nError: x"), ("convert", "\x1b[31m\udcff", *out)):
        result = hydrazero(*words)
        assert result.exit_code == 1 and "\n" not in result.output.strip(), result.output
        assert "\\x1b[31m" in result.output
        check_plain(result.output)
    source = write_extxyz(tmp_path / "a.extxyz", molecules(8))
    source.write_text(source.read_text().replace("O  ", "\x1b[2JO ", 1))
    result = hydrazero("convert", source, "--task", "t", "--out", tmp_path / "o")
    assert result.exit_code == 1
    check_plain(result.stderr, "\r") if "\x1b[?25" not in result.stderr else None


def test_a_report_of_a_folder_with_a_formula_in_its_name(made, tmp_path):
    folders = []
    for number in range(2):
        folder = tmp_path / f"$\\frac{{$ [bold] <i>{number}"
        train = {"steps": 2, "evaluate_every": 1, "log_every": 1, "checkpoint_every": 2}
        tasks = [{"name": "$\\molecules$ [red] <b>", "shards": str(made)}]
        tasks[0]["name"] = tasks[0]["name"].replace("\\", "")
        path = write_small_run(folder, made.parent, train=train, tasks=tasks, balance={"method": "uniform"})
        result = hydrazero("train", path)
        assert result.exit_code == 0, result.output
        assert "[red] <b>" in result.stderr
        folders.append(folder / "run")
    for words in ((folders[0],), folders):
        page = tmp_path / "page.html"
        result = hydrazero("report", *words, "--out", page)
        assert result.exit_code == 0, repr(result.exception)
        assert re.search(r"<i>|<b>[^<]*\[red", page.read_text()) is None


def test_names_that_are_no_text(tmp_path):
    """File names are bytes; those that are no UTF-8 can be read, and their source ids can be written."""
    source = write_extxyz(tmp_path / "plain.extxyz", molecules(40))
    odd = tmp_path / os.fsdecode(b"od\xffd\x1b[31m.extxyz")
    source.rename(odd)
    result = hydrazero("convert", odd, "--task", "t", "--out", tmp_path / "out")
    assert result.exit_code == 0, repr(result.exception) + result.output
    manifest = read_manifest(tmp_path / "out")
    assert all("\\udcff" in one.source_id and "\x1b" not in one.source_id for one in manifest.outliers["force_norm"])
    result = hydrazero("inspect", tmp_path / "out")
    assert result.exit_code == 0
    check_plain(result.output)
