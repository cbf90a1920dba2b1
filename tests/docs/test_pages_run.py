"""Commands and Python on the pages of the manual run as they stand there, with few steps and little data."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest
from page_blocks import blocks_of, run_page, runs
from short_pages import shorter

from hydrazero.trainer.demo.labels import make_demo_sources

pytestmark = [pytest.mark.docs, pytest.mark.ranks]

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    str(path.relative_to(DOCS)): text
    for path in sorted(DOCS.rglob("*.md"))
    if "generate" not in path.parts and any(map(runs, blocks_of(text := path.read_text(encoding="utf-8"))))
}

MAKES_ITSELF = {
    "quickstart.md": ["data", "first", "first.toml"],
    "guide/convert.md": ["data"],
    "guide/train.md": ["first"],
}
"""What a page makes under runs/ itself, so that it is not there when the page begins."""

COUNTS = {"gfn2": 40, "emt": 60, "tersoff": 40}
"""Structures of the small demo."""


@pytest.fixture(scope="session")
def worked_in(tmp_path_factory):
    """A folder in which a small demo has been run, and the quickstart."""
    folder = tmp_path_factory.mktemp("manual")
    demo = folder / "runs" / "demo"
    make_demo_sources(demo / "sources", counts=COUNTS)
    settings = (resources.files("hydrazero.launch") / "runs" / "demo.toml").read_text(encoding="utf-8")
    tasks = "".join(f'[[tasks]]\nname = "{name}"\nshards = "runs/demo/shards/{name}"\n' for name in COUNTS)
    lines = [
        *(f"convert runs/demo/sources/{name}.extxyz --task {name} --out runs/demo/shards/{name}" for name in COUNTS),
        "train runs/demo/run.toml",
        "evaluate runs/demo",
        "export runs/demo --out runs/demo/model.safetensors",
        "report runs/demo",
        "screen runs/demo/model.safetensors runs/demo/shards/emt --out runs/demo/screen.parquet",
    ]
    commands = "".join(f"$ hydrazero {line}\n" for line in lines)
    page = f'```toml title="runs/demo/run.toml"\n{settings}\n{tasks}```\n\n```console\n{commands}```\n'
    run_page(page, folder, shorter)
    run_page(PAGES["quickstart.md"], folder, shorter)
    return folder


@pytest.mark.parametrize("page", list(PAGES))
def test_a_page_runs(page, worked_in, tmp_path):
    shutil.copytree(worked_in, tmp_path, dirs_exist_ok=True)
    for name in MAKES_ITSELF.get(page, []):
        made = tmp_path / "runs" / name
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    run_page(PAGES[page], tmp_path, shorter)
