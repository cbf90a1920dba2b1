"""`hydrazero inspect`: true facts for programs, tables that fit a terminal for people."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from sources import make_shards, metals, molecules

from hydrazero.shards.inspection import describe, size_bins
from hydrazero.shards.manifest import read_manifest
from hydrazero.trainer.cli import main


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = molecules(60) + metals(20) + molecules(3)
    return make_shards(tmp_path_factory.mktemp("data"), "emt", frames, source={"method": "EMT"})


def test_json_holds_the_facts(shards):
    result = CliRunner().invoke(main, ["inspect", str(shards), "--json"])
    facts, manifest = json.loads(result.stdout), read_manifest(shards)
    assert result.exit_code == 0
    assert facts["task"] == "emt" and facts["structures"] == 83 and facts["duplicate_count"] == 3
    assert sum(split["structures"] for split in facts["splits"].values()) == 83
    atoms = sum(split["atoms"] for split in facts["splits"].values())
    assert atoms == facts["atoms"] == sum(facts["elements"].values())
    tars = {path.name: path.stat().st_size for path in shards.glob("*.tar")}
    assert sum(split["bytes"] for split in facts["splits"].values()) == sum(tars.values())
    assert sum(facts["size_histogram"].values()) == 83 and facts["periodic_structures"] == 20
    assert facts["labels"]["forces"]["minimum"] == manifest.labels["forces"].minimum
    assert facts["source"]["method"] == "EMT" and facts["units"]["forces"] == "eV/Å"


def test_tables_fit_a_terminal(shards):
    manifest = read_manifest(shards)
    console = Console(width=80, record=True, file=StringIO())
    console.print(describe(manifest))
    text = console.export_text()
    assert "…" not in text  # rich's mark of a value that was cut
    for label in manifest.labels.values():
        for value in (label.minimum, label.maximum, label.mean, label.rms):
            assert f"{value:.6g}" in text
    assert "Au" in text and "eV/Å³" in text and "EMT" in text and "3 frames repeat" in text


def test_verify_finds_a_flipped_bit(shards, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert CliRunner().invoke(main, ["inspect", str(copy), "--verify"]).exit_code == 0
    tar = bytearray((copy / "val-000000.tar").read_bytes())
    tar[700] ^= 1
    (copy / "val-000000.tar").write_bytes(bytes(tar))
    result = CliRunner().invoke(main, ["inspect", str(copy), "--verify"])
    assert result.exit_code == 1 and "val-000000.tar" in result.stderr


def test_size_bins_lose_nothing():
    generator = np.random.default_rng(0)
    for largest in (1, 5, 12, 13, 250):
        histogram = {int(size): int(size) + 1 for size in generator.integers(1, largest + 1, 20)}
        bins = size_bins(histogram)
        assert len(bins) <= 12 and sum(count for _, count in bins) == sum(histogram.values())
