"""The README: its walk through convert, train, evaluate, export, screen and launch runs as it stands (fewer steps)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_blocks import run_page
from short_pages import shorter

from hydrazero.trainer.demo.labels import make_demo_sources

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS = 1200


def test_the_readme_is_short():
    assert len(README.split()) < MOST_WORDS


def test_links_of_the_readme_lead_somewhere():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_runs(tmp_path):
    make_demo_sources(tmp_path / "runs" / "demo" / "sources", counts={"emt": 60, "tersoff": 40})
    run_page(README, tmp_path, shorter)
    for name in ("model.safetensors", "screen.parquet", "evaluation.json", "launch/job.sh"):
        assert (tmp_path / "runs" / "first" / name).is_file()
