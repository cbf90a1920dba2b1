"""Isolated atoms, reference energies that are taken from them, and sums that the compositions leave undetermined."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from click.testing import CliRunner
from sources import make_shards, molecules, write_extxyz
from test_convert import all_structures

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.references import is_determined, reference_energies, undetermined_sums
from hydrazero.shards.convert.subset import write_subset
from hydrazero.shards.errors import SourceError
from hydrazero.shards.manifest import read_manifest

WATER, HYDROGEN, OXYGEN = -14.2, -1.1, -1.9
"""Energies in eV of a molecule of water and of isolated atoms, of the size that codes with plane waves give."""


def with_energy(atoms: Atoms, energy: float) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
    return atoms


def waters(count: int = 60) -> list[Atoms]:
    frames = []
    for seed in range(count):
        atoms = molecule("H2O", cell=np.eye(3) * 12.0, pbc=True)
        atoms.rattle(0.05, seed=seed)
        frames.append(with_energy(atoms, WATER))
    return frames


def lone(symbol: str, energy: float, pbc: bool = True) -> Atoms:
    return with_energy(Atoms(symbol, positions=[[6, 6, 6]], cell=np.eye(3) * 12.0, pbc=pbc), energy)


def shown(*words: object) -> str:
    result = CliRunner().invoke(main, list(map(str, words)), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("pbc", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_isolated_atoms_in_boxes_are_for_training_and_part_of_the_fit(tmp_path, pbc, seed):
    frames = [*waters(), lone("H", HYDROGEN, pbc), lone("O", OXYGEN, pbc)]
    folder = make_shards(tmp_path, "water", frames, split={"seed": seed})
    found = all_structures(folder)
    assert sum(len(s) == 1 for s in found["train"]) == 2
    manifest = read_manifest(folder)
    assert manifest.isolated_atoms == {"H": HYDROGEN, "O": OXYGEN}
    # Least squares of n waters and both atoms: h = H + 2 d and o = O + d, where n (W - 2 h - o) = d.
    n = manifest.structures("train") - 2
    d = n * (WATER - 2 * HYDROGEN - OXYGEN) / (1 + 5 * n)
    assert manifest.reference_energies["H"] == pytest.approx(HYDROGEN + 2 * d, abs=1e-9)
    assert manifest.reference_energies["O"] == pytest.approx(OXYGEN + d, abs=1e-9)
    assert manifest.reference_energies == pytest.approx({"H": -5.124, "O": -3.912}, abs=5e-3)
    assert manifest.undetermined_sums == []


def test_an_atom_with_neighbours_in_the_next_cells_is_not_isolated(tmp_path):
    crystals = [with_energy(bulk("Cu", "fcc", a=3.5 + 0.01 * n), -3.5) for n in range(40)]
    manifest = read_manifest(make_shards(tmp_path, "copper", [*crystals, lone("Cu", -0.3)]))
    assert manifest.isolated_atoms == {"Cu": -0.3}
    assert 0 < manifest.structures("val") + manifest.structures("test") < 20
    wide = with_energy(bulk("Cu", "sc", a=6.5), -0.2)
    near = make_shards(tmp_path / "near", "copper", [*crystals, wide], degree_cutoffs=[5.0])
    far = make_shards(tmp_path / "far", "copper", [*crystals, wide], degree_cutoffs=[5.0, 7.0])
    assert read_manifest(near).isolated_atoms == {"Cu": -0.2} and read_manifest(far).isolated_atoms == {}


def test_references_are_those_of_isolated_atoms_where_the_settings_say_so(tmp_path):
    atoms = [lone("H", HYDROGEN), lone("H", -0.4), lone("O", OXYGEN)]
    atoms[1].positions += 0.1
    ion = lone("O", -20.0)
    ion.info["charge"] = 1
    folder = make_shards(tmp_path, "water", [*waters(), *atoms, ion], references="isolated")
    manifest = read_manifest(folder)
    assert manifest.reference_energies == {"H": HYDROGEN, "O": OXYGEN}  # the ground states of neutral atoms
    assert manifest.labels["energy_residual_per_atom"].maximum == pytest.approx(-0.4 - HYDROGEN)
    subset = write_subset(folder, tmp_path / "part", {"train": manifest.structures("train")}, seed=0)
    assert subset.references == "isolated"
    with pytest.raises(
        SourceError, match=r"references = 'isolated', but .* no neutral isolated atom of O with an energy"
    ):
        make_shards(tmp_path / "less", "water", [*waters(), atoms[0]], references="isolated")


def test_what_was_taken_is_said_with_both_energies(tmp_path):
    source = write_extxyz(tmp_path / "w.extxyz", [*waters(), lone("H", HYDROGEN), lone("O", OXYGEN)])
    said = shown("convert", source, "--task", "w", "--out", tmp_path / "w")
    assert "reference energies: fitted by least squares; those of isolated atoms differ by more than 1 eV" in said
    assert "H -5.12" in said and "(isolated atom -1.100)" in said and "(isolated atom -1.900)" in said
    assert 'references = "isolated" takes those of the isolated atoms' in said
    assert "fitted by least squares" in shown("inspect", tmp_path / "w")
    (tmp_path / "c.toml").write_text('references = "isolated"\n')
    said = shown("convert", source, "--task", "w", "--config", tmp_path / "c.toml", "--out", tmp_path / "i")
    assert "reference energies: those of the isolated atoms" in said
    assert "-1.1000" in shown("inspect", tmp_path / "i")
    plain = write_extxyz(tmp_path / "m.extxyz", molecules(30))
    assert "reference energies" not in shown("convert", plain, "--task", "m", "--out", tmp_path / "m")


def triangle(rows: list[dict[int, int]]) -> np.ndarray:
    table = np.zeros((len(rows), 120))
    for row, counts in zip(table, rows, strict=True):
        for number, count in counts.items():
            row[number] = count
        row[-1] = -sum(3.0 * number * count for number, count in counts.items())
    return np.linalg.qr(table, mode="r")


def test_undetermined_sums_are_those_orthogonal_to_no_composition():
    one = triangle([{1: 2, 8: 1}, {1: 2, 8: 1}, {1: 64, 8: 32}])
    assert undetermined_sums(one) == [{"H": 1.0, "O": -2.0}]
    assert is_determined([1, 1, 8], undetermined_sums(one)) and is_determined([8, 1, 1] * 40, undetermined_sums(one))
    assert not is_determined([1, 8], undetermined_sums(one)) and not is_determined([8], undetermined_sums(one))
    fitted = reference_energies(one)
    assert 2 * fitted["H"] + fitted["O"] == pytest.approx(-30.0)
    oxides = triangle([{22: 1, 8: 2}, {44: 2, 8: 4}])
    (combination,) = undetermined_sums(oxides)
    assert combination == {"O": 1.0, "Ti": -2.0, "Ru": -2.0}
    assert is_determined([22, 44, 8, 8, 8, 8], [combination]) and not is_determined([22, 8], [combination])
    assert undetermined_sums(triangle([{1: 2, 8: 1}, {8: 2}])) == []
    assert undetermined_sums(np.zeros((0, 120))) == []


def test_a_task_of_one_composition_says_that_others_are_arbitrary(tmp_path):
    source = write_extxyz(tmp_path / "w.extxyz", waters(20))
    words = (
        "do not determine the reference energies of H and O separately, so that total energies of other compositions"
    )
    (tmp_path / "c.toml").write_text("[split]\ntrain = 1.0\nval = 0.0\ntest = 0.0\n[source]\nmethod = 'x'\n")
    said = shown("convert", source, "--task", "w", "--config", tmp_path / "c.toml", "--out", tmp_path / "w")
    assert words in said.strip().splitlines()[-1]  # after other warnings
    assert "warning: there are no validation structures" in said and "warning: there are no test structures" in said
    said = shown("inspect", tmp_path / "w")
    assert words in said and said.count("(not determined)") == 2
    assert read_manifest(tmp_path / "w").undetermined_sums == [{"H": 1.0, "O": -2.0}]
    assert ase.io.read(Path(source), 0).get_chemical_formula() == "H2O"
