"""Settings that the manual shows are understood: each block of TOML as a part of one of the settings files."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import pytest
import tomli_w
from page_blocks import blocks_of

from hydrazero.launch.job.site_file import load_site
from hydrazero.models.screening.prototypes import GeneratedSource
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import HydrazeroError
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.search.space import read_space

DOCS = Path(__file__).parents[2] / "docs"
# Those of the guides are tested in test_guides.py; templates stand for the pages that are made of them.
GENERATED = [DOCS / "reference" / path.name for path in (DOCS / "generate" / "templates").glob("*.md")]
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "guide" not in path.parts and path not in GENERATED]
BLOCKS = [
    pytest.param(block.text, id=f"{path.relative_to(DOCS)}-{number}")
    for path in PAGES
    for number, block in enumerate(blocks_of(path.read_text(encoding="utf-8")))
    if block.language == "toml"
]
RUN = {"run": {"out": "x"}, "tasks": [{"name": "a", "shards": "b"}], "train": {"steps": 20000}}
"""What a run file cannot lack."""


def completed(table, whole):
    """A table with what it lacks of another one."""
    both = {**whole, **table}
    for key in table.keys() & whole.keys():
        if isinstance(table[key], Mapping) and isinstance(whole[key], Mapping):
            both[key] = completed(table[key], whole[key])
    return both


def as_run_file(table, path):
    tasks = [completed(task, RUN["tasks"][0]) for task in table.get("tasks", RUN["tasks"])]
    path.write_text(tomli_w.dumps({**completed(table, RUN), "tasks": tasks}))
    config = load_run_config(path)
    deepspeed_config(config.deepspeed, config.train.steps)


def as_conversion(table, path):
    path.write_text(tomli_w.dumps(table))
    load_convert_settings(path)


def as_generated_structures(table, path):
    path.write_text(tomli_w.dumps(table))
    GeneratedSource(path)


def as_site(table, path):
    local = (resources.files("hydrazero.launch") / "sites" / "local.toml").read_text(encoding="utf-8")
    path.write_text(tomli_w.dumps(completed(table, tomllib.loads(local))))
    load_site(str(path))


def as_search_space(table, path):
    path.write_text(tomli_w.dumps(table))
    read_space(path)


@pytest.mark.parametrize("text", BLOCKS)
def test_settings_are_understood(text, tmp_path):
    table, said = tomllib.loads(text), []
    for load in (as_run_file, as_conversion, as_generated_structures, as_search_space, as_site):
        try:
            load(table, tmp_path / "settings.toml")
            return
        except HydrazeroError as error:
            said.append(str(error))
    pytest.fail("\n".join(said))
