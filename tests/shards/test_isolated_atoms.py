"""Isolated atoms, reference energies that are taken from them, and sums that the compositions leave undetermined."""

from __future__ import annotations

from dataclasses import replace
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
from hydrazero.launch.cli.views.shards_view import SIDE_BY_SIDE, side_by_side_rows
from hydrazero.shards.convert.checks.left_out_atoms import LeftOutAtoms
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
    # It counts among the bound structures exactly if it is not taken as an isolated atom.
    for folder, alike in ((near, False), (far, True)):
        found = read_manifest(folder)
        assert (found.bound_residual_rms == found.labels["energy_residual_per_atom"].rms) == alike


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
    assert "reference energies were fitted; those of isolated atoms differ by more than 1 eV (H -5.12" in said
    assert " fitted, -1.100 isolated; O -3.91" in said and " fitted, -1.900 isolated). If you need atomi" in said
    assert 'set references = "isolated" in the conversion file; otherwise the fit leaves less to learn' in said
    assert "reference energies were fitted" in shown("inspect", tmp_path / "w")
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


def test_errors_of_the_references_are_also_given_without_isolated_atoms(tmp_path):
    atoms = [lone("H", HYDROGEN), lone("O", OXYGEN, pbc=False)]
    folder = make_shards(tmp_path, "water", [*waters(), *atoms])
    manifest = read_manifest(folder)
    h, o = (manifest.reference_energies[symbol] for symbol in "HO")
    assert manifest.bound_residual_rms == pytest.approx(abs(WATER - 2 * h - o) / 3, rel=1e-6)
    assert manifest.labels["energy_residual_per_atom"].rms > 5 * manifest.bound_residual_rms
    words = f"energy - references has a root mean square of {1000 * manifest.bound_residual_rms:.3g} meV/atom without"
    assert words in shown("inspect", folder)
    other = make_shards(tmp_path / "b", "other", waters(20))
    assert "without isolated atoms" not in shown("inspect", other)
    both = " ".join(shown("inspect", folder, other).split())
    assert "minus reference energies (without isolated atoms), meV/atom" in both
    assert f" {1000 * manifest.bound_residual_rms:.0f} 0.00" in both
    # An earlier conversion does not know that value: then all rows are with isolated atoms.
    old = replace(read_manifest(other), bound_residual_rms=None)
    rows, mixed = side_by_side_rows([manifest], "5"), side_by_side_rows([manifest, old], "5")
    column = SIDE_BY_SIDE.index("energy")
    assert rows[0][column] == f"{1000 * manifest.bound_residual_rms:,.0f}"
    total = manifest.labels["energy_residual_per_atom"].rms
    assert mixed[0][column] == f"{1000 * total:,.0f}"
    assert side_by_side_rows([replace(manifest, bound_residual_rms=0.0)], "5")[0][column] == "0"
    subset = write_subset(folder, tmp_path / "part", {"train": manifest.structures("train")}, seed=0)
    assert subset.bound_residual_rms == pytest.approx(manifest.bound_residual_rms)


def test_isolated_atoms_without_the_field_of_select_are_named_with_what_to_do(tmp_path):
    atoms, molecules_ = [lone("H", HYDROGEN), lone("O", OXYGEN)], waters()
    for frame in molecules_:
        frame.info["kind"] = "md"
    source = write_extxyz(tmp_path / "a.extxyz", [*atoms, *molecules_])
    (tmp_path / "c.toml").write_text("[select]\nkind = ['md']\n")
    said = shown("convert", source, "--task", "w", "--config", tmp_path / "c.toml", "--out", tmp_path / "w")
    start = "isolated atoms of H, O are left out, which would help to determine the reference energies"
    assert f"{start}; give them the field 'kind', which [select] names and they lack\n" in said
    # An atom that is bad in another way lacks no field and no label.
    (text,) = LeftOutAtoms({"H": []}).warnings([{"H": 1.0, "O": -2.0}], {"H", "O"})
    assert text == f"{start.replace('H, O', 'H')}; correct their frames, which are skipped as bad."


@pytest.mark.parametrize("how", ["select", "skip"])
def test_isolated_atoms_that_are_left_out_are_named(tmp_path, how):
    """Those of elements of the task, where its energies are open; also in a file of their own."""
    atoms = [Atoms(symbol, positions=[[0, 0, 0]]) for symbol in "OHN"]
    for energy, frame in zip((OXYGEN, HYDROGEN, -3.0), atoms, strict=True):
        frame.calc = SinglePointCalculator(frame, energy=energy)  # without forces
    molecules_ = waters()
    for frame in [*atoms, *molecules_] if how == "select" else []:
        frame.info["kind"] = "atom" if len(frame) == 1 else "md"
    sources = [write_extxyz(tmp_path / "a.extxyz", atoms), write_extxyz(tmp_path / "w.extxyz", molecules_)]
    (tmp_path / "c.toml").write_text("[select]\nkind = ['md']\n" if how == "select" else "")
    words = ["convert", *sources, "--task", "w", "--config", tmp_path / "c.toml", "--skip-bad", "--out", tmp_path / "w"]
    said = shown(*words)
    step = "add kind = 'atom' to [select] and " if how == "select" else ""
    assert (
        "warning: isolated atoms of H, O are left out, which would help to determine the reference energies; "
        f"{step}set require = ['energy'] under [labels], since they have no other labels; leave out those of N, which "
        "no other structure holds\n"
    ) in said
    (tmp_path / "d.toml").write_text(
        "[labels]\nrequire = ['energy']\n[select]\n" + "kind = ['md', 'atom']\n" * (how == "select")
    )
    words[words.index(tmp_path / "c.toml")] = tmp_path / "d.toml"
    assert "left out" not in shown(*words[:-1], tmp_path / "x")
    assert read_manifest(tmp_path / "x").undetermined_sums == []
