"""The shards of benchmarks can be read as those of a conversion."""

from __future__ import annotations

from ase.build import molecule
from bench_shards import write_bench_shards

from hydrazero.models.inference.potential import structure_from_atoms
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.stream.block_reader import BlockReader


def test_shards_of_benchmarks_are_read(tmp_path):
    write_bench_shards(tmp_path, [structure_from_atoms(molecule(name)) for name in ("H2O", "CH4", "C6H6")], block=2)
    assert read_manifest(tmp_path).structures("train") == 3
    reader = BlockReader(tmp_path, "train")
    blocks = [reader.read(number) for number in range(len(reader))]
    assert [len(block.structure(row)) for block in blocks for row in range(len(block))] == [3, 5, 12]
