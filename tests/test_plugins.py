"""A package of somebody else, installed with pip, that brings a reader, an encoder and a balancer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import write_small_run
from structures import rattled_molecule

from hydrazero.shards.manifest import read_manifest
from hydrazero.trainer.records.run_files import read_metrics

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "hydrazero-example"
version = "1.2"

[project.entry-points."hydrazero.readers"]
lines = "hydrazero_example.reader:read_lines"

[project.entry-points."hydrazero.encoders"]
nearest = "hydrazero_example.encoder:Nearest"

[project.entry-points."hydrazero.balancers"]
falling = "hydrazero_example.balancer:Falling"

[tool.setuptools]
packages = ["hydrazero_example"]
"""

READER = '''
"""Files with one JSON object on each line."""

import json
from functools import partial

from hydrazero.shards.readers.frames import FrameMaker, RawFrame, UnreadFrame, reader


@reader(suffixes=(".jsonl",))
def read_lines(path, settings):
    """Read objects with numbers, positions, energy and forces."""
    maker, size = FrameMaker(settings), path.stat().st_size

    def read(line, source_id):
        entry = json.loads(line)
        raw = RawFrame(**{"cell": [[0.0] * 3] * 3, "pbc": False, **entry})
        return maker.make(raw, source_id, {})

    with path.open("rb") as file:
        for number, line in enumerate(iter(file.readline, b"")):
            source_id = f"{path.name}#{number}"
            yield UnreadFrame(source_id=source_id, read=partial(read, line, source_id), fraction=file.tell() / size)
'''


ENCODER = '''
"""An encoder of scalars: one sum over the neighbours."""

from torch import nn

from hydrazero.models.encoders.base import Encoder, NodeFeatures, size_table
from hydrazero.models.ops.exact import ExactLinear


class Nearest(Encoder):
    """Sum of the neighbours' features, weighted by a learned function of the distance."""

    sizes = size_table(features=(8, 16, 24, 32), layers=(1, 1, 1, 1))

    def __init__(self, settings):
        super().__init__(settings)
        self.weights = ExactLinear(settings.radial_functions + 1, settings.features, bias=False)
        self.mix = nn.Linear(settings.features, settings.features)

    def forward(self, atoms, pairs):
        """Return the node features of atoms."""
        messages = self.weights(pairs.radial) * pairs.slots.gather(self.mix(atoms.scalars))
        return NodeFeatures(scalars=atoms.scalars + pairs.slots.sum_rows(messages.sum(1)))
'''

BALANCER = '''
"""Weights of the tasks in proportion to 1, 1/2, 1/3, ..."""

import torch

from hydrazero.trainer.balance.base import Balancer, bounded


class Falling(Balancer):
    """Fixed weights that fall with the number of the task."""

    def start(self):
        """Set the weights."""
        numbers = torch.arange(1, len(self.weights) + 1, dtype=torch.float64)
        self.weights = bounded(1.0 / numbers, self.settings.smallest, self.settings.largest)
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return the folder into which the package is installed."""
    root = tmp_path_factory.mktemp("example")
    (root / "source/hydrazero_example").mkdir(parents=True)
    (root / "source/pyproject.toml").write_text(PROJECT)
    (root / "source/hydrazero_example/__init__.py").write_text("")
    (root / "source/hydrazero_example/reader.py").write_text(READER)
    (root / "source/hydrazero_example/balancer.py").write_text(BALANCER)
    (root / "source/hydrazero_example/encoder.py").write_text(ENCODER)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", root / "site", root / "source"], check=True)
    return root / "site"


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """Return a file of the format that the package reads."""
    path = tmp_path_factory.mktemp("lines") / "water.jsonl"
    entries = []
    for seed in range(40):
        atoms = rattled_molecule("H2O", seed)
        forces = (-atoms.positions).tolist()
        entry = {"numbers": atoms.numbers.tolist(), "positions": atoms.positions.tolist(), "forces": forces}
        entries.append(json.dumps({**entry, "energy": -14.0 + 0.01 * seed}))
    path.write_text("\n".join(entries) + "\n")
    return path


def command(*words: object, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run hydrazero, with the package installed in `site` or without it."""
    paths = [os.environ.get("PYTHONPATH", ""), *([str(site)] if site else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = "from hydrazero.launch.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.fixture(scope="module")
def data(installed, lines, tmp_path_factory) -> Path:
    """Return a folder with the shards of two tasks, converted by the reader of the package."""
    folder = tmp_path_factory.mktemp("data")
    for task in ("water", "vapour"):
        done = command("convert", lines.parent, "--task", task, "--out", folder / task, site=installed)
        assert done.returncode == 0, done.stderr
    return folder


def test_sources_are_read_by_the_reader_of_a_package(installed, lines, data, tmp_path):
    assert read_manifest(data / "water").structures() == 40
    named = [tmp_path / "water.txt", "--task", "water", "--out", tmp_path / "b", "--workers", 2, "--format", "lines"]
    (tmp_path / "water.txt").write_bytes(lines.read_bytes())
    by_name = command("convert", *named, site=installed)
    assert by_name.returncode == 0, by_name.stderr
    assert read_manifest(tmp_path / "b").structures() == 40


def test_formats_of_packages_are_listed(installed):
    rows = command("convert", "--list-formats", site=installed).stdout.splitlines()
    assert "lines         .jsonl (package hydrazero-example)" in rows
    assert any(row.split()[:2] == ["extxyz", ".xyz"] for row in rows)


def test_without_the_package_its_format_is_unknown(lines, tmp_path):
    result = command("convert", lines, "--task", "water", "--out", tmp_path / "out", "--format", "lines")
    assert result.returncode == 1 and "Error: unknown format 'lines' (known: alexandria, " in result.stderr


def test_a_run_uses_the_balancer_of_a_package(installed, data, tmp_path):
    tasks = [{"name": name, "shards": str(data / name)} for name in ("water", "vapour")]
    train = {"steps": 2, "evaluate_every": 2}
    path = write_small_run(tmp_path, data, tasks=tasks, balance={"method": "falling"}, train=train)
    without = command("train", path)
    assert without.returncode == 1 and "unknown balance.method 'falling'" in without.stderr
    done = command("train", path, site=installed)
    assert done.returncode == 0, done.stderr
    weights = [row["weights"] for row in read_metrics(tmp_path / "run") if "weights" in row]
    assert weights and weights[-1]["water"] == pytest.approx(4 / 3)


def test_a_model_with_the_encoder_of_a_package_is_trained_exported_and_used(installed, data, tmp_path):
    tasks = [{"name": name, "shards": str(data / name)} for name in ("water", "vapour")]
    train, own = {"steps": 2, "evaluate_every": 2}, {"encoder": "nearest", "features": 8, "layers": 1}
    path = write_small_run(tmp_path, data, tasks=tasks, model=own, balance={"method": "falling"}, train=train)
    without = command("train", path, "--set", "balance.method=uniform")
    assert without.returncode == 1 and "unknown encoder 'nearest'" in without.stderr
    model = tmp_path / "model.safetensors"
    for words in (("train", path), ("export", tmp_path / "run", "--out", model), ("inspect", model)):
        done = command(*words, site=installed)
        assert done.returncode == 0, done.stderr
    assert "package hydrazero-example 1.2" in done.stdout
    screened = ("screen", model, data / "water", "--out", tmp_path / "screen.parquet")
    done = command(*screened, site=installed)
    assert done.returncode == 0 and "40 of 40 structures computed" in done.stdout, done.stderr
    sentence = (
        f"Error: {model}: the encoder 'nearest' comes from the package 'hydrazero-example', which is not installed; "
        "run: pip install hydrazero-example\n"
    )
    done = command("screen", model, data / "water", "--out", tmp_path / "other.parquet")
    assert done.returncode == 1 and done.stderr.endswith(sentence), done.stderr
