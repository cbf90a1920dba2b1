"""The pages of results hold the sentences of the scripts and tables that write them, so that neither changes alone."""

from __future__ import annotations

import re
import tomllib

import pytest
from results import search_page, sixteen_page
from results.jobs import HERE, PAGES


@pytest.mark.parametrize("name", ["balancing", "encoders", "finetune", "precision"])
def test_pages_hold_the_texts_of_their_tables(name):
    spec = tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    texts = [spec["title"], spec["text"], spec.get("findings", "")]
    held_out = any(data.get("held_out") for data in spec["data"])
    texts += [data.get("text", "") for data in spec["data"] if data.get("held_out") or not held_out]
    for text in texts:
        assert text.strip() in page


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("sixteen", [sixteen_page.TEXT]),
        ("search", [search_page.TEXT, search_page.FRONT, search_page.IMPORTANCE, *search_page.PICTURES.values()]),
    ],
)
def test_pages_hold_the_texts_of_their_scripts(name, texts):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for text in texts:
        pattern = ".*?".join(re.escape(part) for part in re.split(r"\{[^}]*\}", text))
        assert re.search(pattern, page), text
