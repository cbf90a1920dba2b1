"""What the guides say in TOML and in tables, held to the code; their commands are run with those of all pages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from structures import facts

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders import ENCODERS, SIZES, size_settings
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.screening.prototypes import GeneratedSource
from hydrazero.shards.convert.presets import preset_names
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.files import toml_text
from hydrazero.shards.readers import READERS
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.search.space import read_space

GUIDES = Path(__file__).parents[2] / "docs" / "guide"
BASE = """
[run]
out = "runs/base"
start_from = "runs/first"
[[tasks]]
name = "a"
shards = "runs/data/a"
[train]
steps = 20000
"""


def guide(name: str) -> str:
    return (GUIDES / f"{name}.md").read_text(encoding="utf-8")


def toml_blocks(name: str) -> list[str]:
    return re.findall(r"^```toml[^\n]*\n(.*?)^```", guide(name), flags=re.DOTALL | re.MULTILINE)


RUN_FILE_BLOCKS = [
    pytest.param(name, block, id=f"{name}-{number}")
    for name in ("train", "encoders", "finetune")
    for number, block in enumerate(toml_blocks(name))
]


@pytest.mark.parametrize(("name", "block"), RUN_FILE_BLOCKS)
def test_parts_of_run_files_in_the_guides_are_understood(name, block, tmp_path):
    """A block that is no complete run file stands in one, its own tables in place of those there."""
    (tmp_path / "run.toml").write_text(toml_text({**tomllib.loads(BASE), **tomllib.loads(block)}))
    config = load_run_config(tmp_path / "run.toml")
    deepspeed_config(config.deepspeed, config.train.steps)


@pytest.mark.parametrize("name", ["convert", "presets"])
def test_conversion_files_in_the_guides_are_understood(name, tmp_path):
    for number, block in enumerate(toml_blocks(name)):
        (tmp_path / f"{number}.toml").write_text(block)
        load_convert_settings(tmp_path / f"{number}.toml")


def test_space_files_in_the_guide_are_understood(tmp_path):
    for number, block in enumerate(toml_blocks("search")):
        (tmp_path / f"{number}.toml").write_text(block)
        read_space(tmp_path / f"{number}.toml")


def test_the_specification_of_generated_structures_makes_what_the_guide_says(tmp_path):
    (block,) = toml_blocks("screen")
    (tmp_path / "spec.toml").write_text(block)
    assert GeneratedSource(tmp_path / "spec.toml").known_length() == 27


def test_all_formats_and_presets_are_in_the_guides():
    convert, presets = guide("convert"), guide("presets")
    assert [name for name in READERS.names() if f"`{name}`" not in convert] == []
    assert [name for name in preset_names() if f"`{name}`" not in presets] == []


@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_the_guide_counts_parameters(encoder):
    row = next(line for line in guide("encoders").splitlines() if line.startswith(f"| `{encoder}` |"))
    for size, shown in zip(SIZES, [cell.strip() for cell in row.split("|")][3:7], strict=True):
        settings = size_settings(encoder, size)
        heads = settings.pop("head_features")
        model = AtomisticModel(
            ModelSettings(encoder=EncoderSettings(encoder=encoder, **settings), head_features=heads), [facts("x")]
        )
        count = sum(parameter.numel() for parameter in model.parameters())
        assert shown == (f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k")
