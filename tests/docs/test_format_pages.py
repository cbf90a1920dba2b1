"""The pages on file formats agree with what the code writes: readers on the pages read it, and every key is named."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from pydantic import BaseModel
from sources import make_shards, metals

from hydrazero.launch.postmortem import Verdict
from hydrazero.models import load_model
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.inference import model_file
from hydrazero.models.inference.model_card import Origin, model_card
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.screening.columns import schema_of
from hydrazero.models.screening.settings import ScreenSettings
from hydrazero.models.task_facts import TargetFacts, TaskFacts
from hydrazero.shards import manifest
from hydrazero.shards.block import StructureBlock
from hydrazero.trainer.engine.run_balance import RunBalance
from hydrazero.trainer.evaluation.errors import AbsoluteErrors, spread_summary
from hydrazero.trainer.evaluation.errors import schema_of as predictions_schema
from hydrazero.trainer.loop import Trainer
from hydrazero.trainer.records.task_errors import TaskErrors

FORMATS = Path(__file__).parents[2] / "docs" / "reference" / "formats"
WATER = Atoms("OHH", [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])


def page(name: str) -> str:
    return (FORMATS / f"{name}.md").read_text(encoding="utf-8")


def defaults_of(kind: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or a pydantic model with their defaults, MISSING where there is none."""
    if issubclass(kind, BaseModel):
        of_model = kind.model_fields.items()
        return {name: MISSING if field.is_required() else field.get_default() for name, field in of_model}
    found = {each.name: each for each in fields(kind)}
    return {
        name: each.default if each.default_factory is MISSING else each.default_factory()
        for name, each in found.items()
    }


def run_example(name: str, first_line: str) -> str:
    """Run the first Python block of a page with another first line; returns what it prints."""
    (block, *_) = re.findall(r"^```python\n.*?\n(.*?)^```", page(name), flags=re.DOTALL | re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", f"{first_line}\n{block}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("formats"), "metals", metals(40))


def test_the_reader_of_shards_gives_the_structures(shards):
    printed = run_example("shards", f"folder = {str(shards)!r}").splitlines()
    assert len(printed) == 3
    name, rest = printed[0].split(" ", 1)
    atoms, energy = re.fullmatch(r"(\d+) atoms (\S+) eV", rest).groups()
    frame = metals(40)[int(name.rpartition("#")[2])]
    assert (int(atoms), float(energy)) == (len(frame), pytest.approx(frame.get_potential_energy()))


def test_the_reader_of_manifests_checks_files(shards):
    printed = run_example("manifest", f"folder = {str(shards)!r}")
    assert re.search(r"^train \d+ structures$", printed, flags=re.MULTILINE) and "Cu: " in printed


def test_the_reader_of_models_computes_their_energies(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    tasks = [
        TaskFacts(name=name, reference_energies={"H": -1.5, "O": -20.0}, scale=scale, elements=["H", "O"])
        for name, scale in (("other", 1.0), ("gfn2", 2.5))
    ]
    settings = ModelSettings(encoder=EncoderSettings(features=16, layers=2))
    model_file.save_model(AtomisticModel(settings, tasks), path)
    printed = run_example("model-file", f'path, task = {str(path)!r}, "gfn2"')
    (row,) = load_model(path).predict([WATER], tasks=["gfn2"])
    assert float(re.match(r"gfn2: (\S+) eV", printed)[1]) == pytest.approx(row["energy"], abs=2e-5)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("manifest", [manifest.Manifest, manifest.Shard, manifest.LabelRange, manifest.Histogram]),
        ("manifest", [manifest.Outlier, manifest.Degrees, manifest.TargetStatistics]),
        ("model-file", [ModelSettings, EncoderSettings, TaskFacts, TargetFacts]),
        ("run-folder", [Verdict]),
    ],
)
def test_every_field_is_on_the_page(name, kinds):
    for kind in kinds:
        absent = [field for field in defaults_of(kind) if f"`{field}`" not in page(name)]
        assert not absent, kind


def test_every_column_of_a_block_is_on_the_page():
    plain = [each.name for each in fields(StructureBlock) if not each.name.endswith("targets")]
    for name in [*plain, "target.NAME", "atom_target.NAME"]:
        assert f"| `{name}` |" in page("shards"), name


@pytest.mark.parametrize("kind", [ModelSettings, EncoderSettings, TaskFacts])
def test_defaults_of_the_description_are_on_the_page(kind):
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", page("model-file"), flags=re.MULTILINE))
    for name, default in defaults_of(kind).items():
        if default is not MISSING and name != "encoder":
            shown = rows[name].strip("` ")
            assert json.loads(shown) == (list(default) if isinstance(default, tuple) else default), name


def test_versions_are_those_of_the_code():
    assert f"has version {manifest.FORMAT_VERSION}" in page("shards")
    assert f"| `{model_file.FORMAT_VERSION}`. " in page("model-file")
    assert all(f"| {version} | " in page("model-file") for version in model_file.READABLE)


def test_every_key_of_a_card_is_on_the_page():
    task = TaskFacts(name="a", reference_energies={"H": 0.0}, scale=1.0, elements=["H"])
    card = model_card(AtomisticModel(ModelSettings(), [task]), "float32", Origin())
    for key in [*card, *card["tasks"]["a"], "encoder_package"]:
        assert f"`{key}`" in page("model-file"), key


def columns(names: list[str]) -> list[str]:
    return [re.sub(r"_a$", "_TASK", re.sub(r"target_gap", "target_NAME", name)) for name in names]


def test_every_column_of_parquet_is_on_the_page(tmp_path):
    targets = {"gap": TargetFacts(of="structure", kind="scalar")}
    task = TaskFacts(
        name="a", reference_energies={"H": 0.0}, scale=1.0, elements=["H"], targets=targets, closest={"H-H": 0.6}
    )
    path = tmp_path / "model.safetensors"
    model_file.save_model(AtomisticModel(ModelSettings(ensemble=2), [task]), path)
    screen = schema_of(load_model(path), ScreenSettings(tasks=("a",), forces=("a",), relax=1))
    for schema in (predictions_schema(task), screen):
        for name in columns(schema.names):
            assert f"`{name}`" in page("parquet"), name
    for name, kind in zip(columns(screen.names), screen.types, strict=True):
        row = next(line for line in page("parquet").split("## Results")[1].splitlines() if f"| `{name}` |" in line)
        assert f"| {re.sub(r'(item|element): ', '', str(kind))} |" in row, name


@pytest.mark.parametrize("writes", [Trainer._log_interval, Trainer._evaluate, RunBalance._row])
def test_every_key_of_the_metrics_is_on_the_page(writes):
    keys = re.findall(r'"(\w+)":', inspect.getsource(writes))
    assert len(keys) > 3
    for key in (*keys, *TaskErrors(unseen=0).to_json()):
        assert f"`{key}`" in page("run-folder"), key


def test_every_key_of_an_evaluation_is_on_the_page():
    task = TaskFacts(name="a", reference_energies={"H": 0.0}, scale=1.0, elements=["H"])
    summary = AbsoluteErrors(facts=task).summary().to_json()
    spread = spread_summary(torch.ones(3).numpy(), torch.ones(3).numpy())
    assert spread is not None
    for key in [*summary, *spread.to_json(), "fidelity", "weights", "split"]:
        assert f"`{key}`" in page("run-folder"), key
