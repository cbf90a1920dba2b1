"""Parts of a task's shards: prefixes of one shuffle, with statistics of their own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sources import make_shards, molecules

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.references import reference_table
from hydrazero.shards.convert.subset import write_subset
from hydrazero.shards.convert.task_statistics import compositions
from hydrazero.shards.manifest import Manifest, check_shard_files, read_manifest
from hydrazero.shards.stream.block_reader import BlockReader


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("subset"), "molecules", molecules(120))


def names(folder: Path, split: str) -> list[str]:
    reader = BlockReader(folder, split)
    return [name for block in range(len(reader)) for name in reader.read(block).names]


def statistics(manifest: Manifest) -> dict[str, object]:
    own = ("splits", "source", "duplicates", "duplicate_count", "set_aside")
    return {name: value for name, value in asdict(manifest).items() if name not in own}


def test_smaller_parts_are_in_larger_ones(whole, tmp_path):
    for count in (10, 30):
        result = CliRunner().invoke(
            main, ["subset", str(whole), "--out", str(tmp_path / str(count)), "--train", str(count), "--val", "3"]
        )
        assert result.exit_code == 0 and f"(train {count}, val 3, test " in result.output
    assert names(tmp_path / "30", "train")[:10] == names(tmp_path / "10", "train")
    assert names(tmp_path / "10", "val") == names(tmp_path / "30", "val")
    assert names(tmp_path / "10", "test") == names(whole, "test")
    assert set(names(tmp_path / "30", "train")) < set(names(whole, "train"))
    other = write_subset(whole, tmp_path / "other", {"train": 10}, seed=1)
    assert names(tmp_path / "other", "train") != names(tmp_path / "10", "train")
    assert "seed 1" in other.source["subset"]
    check_shard_files(other, tmp_path / "other", checksums=True)


def test_all_of_it_has_the_statistics_of_the_conversion(whole, tmp_path):
    ours, theirs = statistics(write_subset(whole, tmp_path / "all", {})), statistics(read_manifest(whole))
    np.testing.assert_equal(ours, theirs)


def test_references_are_those_of_the_part(whole, tmp_path):
    part = write_subset(whole, tmp_path / "part", {"train": 8, "val": 0, "test": 0})
    assert part.structures() == 8 and part.labels["energy_per_atom"].count == 8
    block = BlockReader(tmp_path / "part", "train").read(0)
    counts = compositions(block)
    rest = block.energy - counts @ np.nan_to_num(reference_table(part.reference_energies))
    # What least squares leave is orthogonal to every element's counts.
    np.testing.assert_allclose(counts.T @ rest, 0.0, atol=1e-6)
    assert part.reference_energies != pytest.approx(read_manifest(whole).reference_energies, abs=1e-3)


def test_bad_parts(whole, tmp_path):
    there = read_manifest(whole).structures("train")
    result = CliRunner().invoke(main, ["subset", str(whole), "--out", str(tmp_path / "a"), "--train", "1000"])
    assert result.exit_code == 1 and f"has {there} structures in the split 'train', not 1,000" in result.output
    (tmp_path / "b").mkdir()
    result = CliRunner().invoke(main, ["subset", str(whole), "--out", str(tmp_path / "b")])
    assert result.exit_code == 1 and "exists" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
