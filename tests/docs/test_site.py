"""The site is complete: every page and picture is there, every key and every command is on a page of the reference."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import pytest
from reference_commands import commands_of
from reference_keys import anchor_of, tables_of
from write_reference import INLINE, ROOTS, pages

from hydrazero.launch.cli.main import main as command_line

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = pages()


def listed(nav):
    """Pages of a navigation."""
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else listed(value)


def written_pages():
    return {
        str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if not {"generate", "__pycache__"} & {*path.parts}
    }


def test_the_navigation_holds_every_page_once():
    nav = list(listed(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))
    assert sorted(nav) == sorted(written_pages())


@pytest.mark.parametrize("name", list(GENERATED))
def test_generated_pages_are_up_to_date(name):
    # They are in the repository, so that links to them work where it is browsed.
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == GENERATED[name], "run make docs and commit"


def test_pictures_are_there():
    # The site's builder checks links and anchors, but not pictures.
    for page in sorted(written_pages()):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", (DOCS / page).read_text(encoding="utf-8")):
            assert (DOCS / page).parent.joinpath(picture).is_file(), f"{page}: {picture}"


@pytest.mark.parametrize("page", list(ROOTS))
def test_every_key_of_a_settings_file_is_explained(page):
    paths = [
        f"{table.path}.{key.name}".lstrip(".")
        for root in ROOTS[page]
        for table in tables_of(root, INLINE)
        for key in table.keys
    ]
    assert paths
    rows = dict(re.findall(r"^\| `\w+`{ #(\S+) } \|.* \| (.*) \|$", GENERATED[f"{page}.md"], flags=re.MULTILINE))
    absent = [path for path in paths if anchor_of(path) not in rows and path != "deepspeed"]
    assert not absent
    unexplained = [path for path in paths if not rows.get(anchor_of(path), "-").strip()]
    assert not unexplained


def test_every_command_and_option_is_on_the_page_of_commands():
    text = GENERATED["commands.md"]
    for name, command in commands_of(command_line, "hydrazero"):
        section = text.partition(f"## {name} {{")[2].partition("\n## ")[0]
        assert section, name
        options = [item for item in command.params if isinstance(item, click.Option) and not item.hidden]
        for option in (name for item in options for name in item.opts):
            assert f"`{option}`" in section, f"{name} {option}"
