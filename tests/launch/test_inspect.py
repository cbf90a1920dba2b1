"""`hydrazero inspect`: true facts for programs, tables that fit a terminal for people."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections import Counter
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.data import chemical_symbols
from ase.neighborlist import neighbor_list
from click.testing import CliRunner
from rich.console import Console
from sources import make_shards, metals, molecules

from hydrazero.launch.cli.main import main
from hydrazero.launch.cli.views.periodic_table import place_of
from hydrazero.launch.cli.views.shards_view import describe, size_bins
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.manifest import SPLITS, read_manifest
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.stream.stream import StreamSettings, TrainStream


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


def test_it_comes_at_once(shards, tmp_path):
    """Without PyTorch, whose import takes longer than all the rest; reports do without it too."""
    code = (
        "import sys\n"
        "from hydrazero.launch.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "main(['inspect', sys.argv[1]], standalone_mode=False)\n"
        "main(['inspect', sys.argv[1], '--html', sys.argv[2]], standalone_mode=False)\n"
        "import hydrazero.trainer.report\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(shards), str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "task emt: 83 structures" in done.stdout, done.stderr


def test_tables_fit_a_terminal(shards):
    manifest = read_manifest(shards)
    console = Console(width=80, record=True, file=StringIO())
    console.print(describe(manifest))
    text = console.export_text()
    assert "…" not in text  # rich's mark of a value that was cut
    for label in manifest.labels.values():
        for value in (label.minimum, label.maximum, label.mean, label.rms):
            assert f"{value:.6g}" in text
    assert "Au" in text and "eV/Å³" in text and "EMT" in text and "3 structures repeat" in text


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


def test_outliers_and_neighbours_are_true(shards):
    """Against the structures themselves, with ASE's neighbour list."""
    manifest = read_manifest(shards)
    reader = {split: BlockReader(shards, split) for split in SPLITS}
    blocks = [block for one in reader.values() for block in (one.read(n) for n in range(len(one)))]
    structures = [block.structure(row) for block in blocks for row in range(len(block))]
    largest = max((s for s in structures), key=lambda s: np.linalg.norm(s.forces, axis=1).max())
    (first, *_) = manifest.outliers["force_norm"]
    assert first.source_id == largest.source_id
    assert first.value == pytest.approx(np.linalg.norm(largest.forces, axis=1).max(), rel=1e-6)
    degrees: Counter[int] = Counter()
    for s in structures:
        atoms = Atoms(numbers=s.numbers, positions=s.positions, cell=s.cell, pbc=s.pbc)
        degrees.update(np.bincount(neighbor_list("i", atoms, 5.0), minlength=len(atoms)).tolist())
    assert manifest.degrees["5"].histogram == degrees
    training = [
        s
        for block in (reader["train"].read(n) for n in range(len(reader["train"])))
        for s in (block.structure(row) for row in range(len(block)))
    ]
    residual = np.array(
        [
            (s.energy - sum(manifest.reference_energies[chemical_symbols[z]] for z in s.numbers)) / len(s)
            for s in training
        ]
    )
    label = manifest.labels["energy_residual_per_atom"]
    assert label.rms == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-9)
    assert sum(manifest.distributions["energy_residual_per_atom"].counts) == len(training)


def test_several_tasks_side_by_side(shards, tmp_path):
    other = make_shards(tmp_path, "metals", metals(40))
    result = CliRunner().invoke(main, ["inspect", str(shards), str(other)])
    assert result.exit_code == 0 and "2 tasks, 123 structures" in result.stdout
    assert any(
        line.split()[:2] == ["metals", str(read_manifest(other).structures("train"))]
        for line in result.stdout.splitlines()
        if line.strip()
    )
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(shards), str(other), "--json"]).stdout)
    assert [one["task"] for one in facts] == ["emt", "metals"]
    page = tmp_path / "tasks.html"
    assert CliRunner().invoke(main, ["inspect", str(shards), str(other), "--html", str(page)]).exit_code == 0
    text = page.read_text()
    assert (
        text.count("data:image/png;base64,") == 3
        and "<td>metals</td>" in text
        and "http" not in text.split("<body>")[0]
    )
    twice = CliRunner().invoke(main, ["inspect", str(shards), str(shards)])
    assert twice.exit_code == 1 and f"{shards} and {shards} both hold a task 'emt'" in twice.stderr


def test_a_proposed_batch_holds_what_it_says(shards, tmp_path):
    other = make_shards(tmp_path, "metals", metals(60))
    arguments = ["inspect", str(shards), str(other), "--propose-batch", "--structures", "24"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    shape = BatchShape(**tomllib.loads(result.stdout)["batch"])
    settings = StreamSettings(folders=(str(shards), str(other)), cutoff=5.0, shape=shape, workers=0)
    batches = [batch for _, batch in zip(range(40), TrainStream(settings, 0, 1), strict=False)]
    filled = np.mean([int(batch.atom_mask.sum()) for batch in batches]) / shape.atoms
    claimed = float(result.stdout.split("# fills ")[1].split("%")[0]) / 100
    assert filled == pytest.approx(claimed, abs=0.05) and filled > 0.85
    assert np.mean([len(batch.names) for batch in batches]) == pytest.approx(24, rel=0.25)
    small = CliRunner().invoke(main, [*arguments, "--memory", "0.01"])
    assert small.exit_code == 1 and "ask for fewer --structures" in small.stderr
    off = CliRunner().invoke(main, [*arguments, "--cutoff", "7"])
    assert off.exit_code == 1 and "degree_cutoffs = [7]" in off.stderr
    for option, value in (("--cutoff", "0"), ("--cutoff", "nan"), ("--temperature", "0")):
        wrong = CliRunner().invoke(main, [*arguments, option, value])
        assert wrong.exit_code == 1 and f"{option} is {value}; it must be" in wrong.stderr


def test_elements_stand_where_they_should():
    assert [place_of(z) for z in (1, 2, 3, 5, 13, 21, 29, 57, 71, 72, 103, 104, 118)] == [
        (0, 0),
        (0, 17),
        (1, 0),
        (1, 12),
        (2, 12),
        (3, 2),
        (3, 10),
        (7, 2),
        (7, 16),
        (5, 3),
        (8, 16),
        (6, 3),
        (6, 17),
    ]
    assert len({place_of(z) for z in range(1, 119)}) == 118


def test_a_run_is_no_conversion(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 1 and "is a run, which 'hydrazero report" in result.output
