"""Labels that disagree, or that cannot be right, are said at conversion and by `inspect`, with the likely cause."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from click.testing import CliRunner
from sources import labelled, metals, molecules, write_extxyz

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert import frames as reading
from hydrazero.shards.convert.checks.magnitudes import all_electron_energies
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.convert.workers import Workers
from hydrazero.shards.manifest import Manifest, read_manifest

KCAL = units.kcal / units.mol


def converted(folder: Path, *files: list[Atoms], workers: Workers | None = None, **settings: object) -> Manifest:
    folder.mkdir(exist_ok=True)
    sources = [write_extxyz(folder / f"{'abcd'[n]}.extxyz", frames) for n, frames in enumerate(files)]
    return convert(sources, "t", folder / "out", ConvertSettings(**settings), workers=workers)  # type: ignore[arg-type]


def relabelled(frames: list[Atoms], change: Callable[[int, dict], dict]) -> list[Atoms]:
    """Return copies whose labels are changed by a function of their number and labels."""
    copies = []
    for number, atoms in enumerate(frames):
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(copy, **change(number, dict(atoms.calc.results)))
        copies.append(copy)
    return copies


def scaled(frames: list[Atoms], **factors: float) -> list[Atoms]:
    return relabelled(frames, lambda _, labels: {key: factors.get(key, 1.0) * v for key, v in labels.items()})


def trajectory(count: int = 30, atoms: Atoms | None = None) -> list[Atoms]:
    """Frames of a random walk of copper atoms in a periodic cell, also across its faces."""
    start = bulk("Cu", cubic=True) * (2, 1, 1) if atoms is None else atoms
    generator, frames = np.random.default_rng(3), []
    positions = start.positions + 0.1 * generator.standard_normal(start.positions.shape)
    for _ in range(count):
        positions = positions + 0.03 * generator.standard_normal(positions.shape)
        frame = start.copy()
        frame.positions = positions
        frame.wrap()
        frames.append(labelled(frame))
    return frames


def volumes(count: int = 24) -> list[Atoms]:
    frames = []
    for scale in np.linspace(0.95, 1.06, count):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell[:] * scale, scale_atoms=True)
        frames.append(labelled(atoms))
    return frames


def test_right_labels_are_not_doubted(tmp_path):
    found = converted(tmp_path / "a", trajectory() + metals(30) + volumes(), molecules(60))
    assert found.warnings == []
    for unit, per in (("Hartree", units.Hartree), ("kcal/mol", KCAL)):
        files = scaled(trajectory() + molecules(40), energy=1 / per, forces=1 / per)
        settings = {"units": {"energy": unit, "forces": f"{unit}/Angstrom"}}
        assert converted(tmp_path / unit[:2], files, **settings).warnings == []


FORCES = [
    ({"forces": -1.0}, {}, "changes by -0.99", "the forces had the opposite sign, as gradients have"),
    ({"forces": units.Bohr / units.Hartree}, {}, "changes by 51", "the forces were in Hartree/Bohr"),
    ({"forces": 1 / KCAL}, {}, "changes by 0.043", "the forces were in kcal/mol/Angstrom"),
    ({"energy": 1 / units.Hartree}, {}, "changes by 0.036", "the energies were in Hartree"),
    ({"energy": 1 / KCAL}, {}, "changes by 23", "the energies were in kcal/mol"),
    ({}, {"units": {"forces": "eV/Bohr"}}, "changes by 0.5", "the forces were in eV/Angstrom"),
    ({"energy": 1 / 8}, {}, "divided by the number of atoms", "set energy_per_atom = true"),
]


@pytest.mark.parametrize(("factors", "settings", "change", "cause"), FORCES)
def test_forces_that_do_not_match_the_energies_of_a_trajectory(tmp_path, factors, settings, change, cause):
    (text,) = [
        text
        for text in converted(tmp_path, scaled(trajectory(), **factors), **settings).warnings
        if "work of the forces" in text
    ]
    assert text.startswith("a.extxyz: between close frames that follow each other, the energy")
    assert change in text and cause in text


def test_forces_of_other_frames(tmp_path):
    frames = trajectory(60)
    wrong = relabelled(frames, lambda _, labels: {**labels, "forces": labels["forces"][[3, 5, 0, 7, 1, 6, 4, 2]]})
    (text,) = converted(tmp_path, wrong).warnings
    assert "the energy changes without any relation to the work of the forces" in text and "other frames" in text


@pytest.mark.parametrize(
    ("factor", "unit", "ratio", "cause"),
    [
        (1 / (0.1 * units.GPa), "eV/Angstrom^3", "0.00062", "the stress was in kbar"),
        (1 / units.GPa, "eV/Angstrom^3", "0.0062", "the stress was in GPa"),
        (-1.0, "eV/Angstrom^3", "-0.99", "the stress was in eV/Angstrom^3 and positive under compression"),
        (1 / units.GPa, "kbar", "9.9", "the stress was in GPa"),
    ],
)
def test_a_stress_that_does_not_match_the_energies_of_strained_cells(tmp_path, factor, unit, ratio, cause):
    found = converted(tmp_path, scaled(volumes(), stress=factor), units={"stress": unit})
    (text,) = [text for text in found.warnings if "work of the stress" in text]
    assert f"changes by {ratio}" in text and cause in text


def test_a_stress_in_another_unit_and_its_outliers(tmp_path):
    frames = metals(40)
    right = converted(tmp_path / "a", frames)
    largest = max(np.abs(atoms.get_stress()).max() for atoms in frames)
    assert right.outliers["stress"][0].value == pytest.approx(largest, rel=1e-5) and right.warnings == []
    (text,) = converted(tmp_path / "b", scaled(frames, stress=1 / (0.1 * units.GPa))).warnings
    assert f"is {largest / (0.1 * units.GPa):.3g} eV/Å³" in text and "as if it were in" in text and "kbar" in text
    part = frames[:30] + scaled(frames[30:], stress=1 / (1e-4 * units.GPa))
    (text,) = converted(tmp_path / "c", part).warnings
    assert "in all or in part of the frames" in text and "bar" in text
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "c" / "out")], env={"COLUMNS": "200"}).output
    assert "warning: the stress of a.extxyz#" in shown and "largest component of the stress" in shown


def test_equal_geometries_with_different_energies(tmp_path):
    frames = metals(20)
    again = relabelled(frames[:6], lambda _, labels: {**labels, "energy": labels["energy"] + 0.8})
    for name, part in (("PBE", frames), ("LDA", again)):
        for number, atoms in enumerate(part):
            atoms.info.update(functional=name, number=number, free=0.1 * number)
    (text, fields) = converted(tmp_path / "a", frames + again).warnings
    assert text.startswith("12 structures in 6 sets of equal geometry have different energies, by up to 0.2 eV/atom")
    assert "(a.extxyz#0 and a.extxyz#20): they differ in 'functional' (LDA, PBE)" in text and "[select]" in text
    assert "2 values of the field 'functional' (LDA 6, PBE 20)" in fields
    chosen = converted(tmp_path / "s", frames + again, select={"functional": ["PBE"]})
    assert chosen.warnings == [] and chosen.duplicate_count == 0
    dropped = converted(tmp_path / "b", frames + again, duplicates="drop").warnings
    assert "duplicates = 'drop' kept the first of each" in dropped[0]
    for atoms in frames + again:
        atoms.info.clear()
    (text,) = converted(tmp_path / "c", frames, again).warnings
    assert "(a.extxyz#0 and b.extxyz#0): they come from different files" in text
    (text,) = converted(tmp_path / "d", frames + again).warnings
    assert "no field of their frames says why" in text
    same = relabelled(frames[:6], lambda _, labels: {**labels, "energy": labels["energy"] + 1e-4})
    equal = converted(tmp_path / "e", frames + same)
    assert equal.warnings == [] and equal.duplicate_count == 6
    many = [
        *relabelled(frames[:1] * 12, lambda n, labels: {**labels, "energy": labels["energy"] + 0.01 * n}),
        frames[1],
    ]
    assert "(a.extxyz#0 and a.extxyz#11)" in converted(tmp_path / "f", many).warnings[0]


def bound(count: int, seed: int = 0) -> list[Atoms]:
    """Molecules and clusters with energies like those of codes with plane waves, about -5 eV per atom."""
    own = {1: -3.0, 6: -8.0, 7: -7.5, 8: -5.0}
    frames = molecules(count, seed)
    return relabelled(
        frames, lambda n, labels: {**labels, "energy": labels["energy"] + sum(own[z] for z in frames[n].numbers)}
    )


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (lambda atoms: 1 / units.Hartree, "the ratio of Hartree and eV"),
        (lambda atoms: 1 / KCAL, "the ratio of eV and kcal/mol"),
        (lambda atoms: 1 / len(atoms), "divided by the number of atoms"),
        (lambda atoms: 40.0, "which no change of the geometry explains"),
    ],
)
def test_energies_of_another_order_of_magnitude_in_a_file(tmp_path, factor, words):
    right = bound(60)
    wrong = [a for a in bound(12, seed=5) if len(a) > 3]
    changed = relabelled(wrong, lambda n, labels: {**labels, "energy": labels["energy"] * factor(wrong[n])})
    (text,) = [t for t in converted(tmp_path, right, changed).warnings if "order of magnitude" in t]
    assert f"the energies of {len(wrong)} of {60 + len(wrong)} structures" in text and "b.extxyz#0" in text
    assert words in text


def test_energies_per_atom_throughout(tmp_path):
    frames = [bulk("Cu", cubic=True) * (1, 1, 1 + n % 3) for n in range(30)]
    for n, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=n)
        energy = -3.5 * len(atoms) + EMT().get_potential_energy(atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=energy / len(atoms), forces=np.zeros((len(atoms), 3)))
    (text,) = converted(tmp_path / "a", frames).warnings
    assert "as if they were energies per atom; set energy_per_atom = true" in text
    assert converted(tmp_path / "b", frames, energy_per_atom=True).warnings == []


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        ("kcal/mol", "the energies are too low to be in eV: that of a.extxyz#"),
        ("kJ/mol", "times the all-electron energy of its atoms; they are probably in kJ/mol; look at"),
        ("meV", "they are probably in meV; look at"),
        ("Hartree", "the energies are probably in Hartree, not in eV"),
        ("Ry", "the energies are probably in Ry, not in eV"),
        ("eV", None),
    ],
)
def test_energies_of_all_electrons_tell_their_unit(tmp_path, unit, words):
    from hydrazero.shards.units import energy_factor

    atom = all_electron_energies()
    assert atom[[6, 8, 18]] == pytest.approx([-1030.0, -2043.0, -14354.0], rel=0.02)  # Hartree-Fock, eV
    frames = molecules(40)
    frames = relabelled(
        frames,
        lambda n, labels: {"energy": (labels["energy"] + 1.01 * atom[frames[n].numbers].sum()) / energy_factor(unit)},
    )
    found = converted(tmp_path, frames, labels={"require": ["energy"]}).warnings
    assert found == [] if words is None else any(words in text for text in found)


def test_atomisation_energies_in_kcal_per_mol(tmp_path):
    own = {1: -70.0, 6: -155.0, 7: -100.0, 8: -98.0}
    frames = molecules(40)
    frames = relabelled(frames, lambda n, labels: {"energy": sum(own[z] for z in frames[n].numbers)})
    (text,) = converted(tmp_path, frames, labels={"require": ["energy"]}).warnings
    said = "each atom of hydrogen lowers the energy by 70 eV on average, while it cannot lower it by more than 30 eV"
    assert said in text and "kcal/mol" in text


def test_stress_without_a_volume_is_said_not_to_be_used(tmp_path):
    slab = [labelled(bulk("Cu", cubic=True)) for _ in range(20)]
    for n, atoms in enumerate(slab):
        atoms.pbc = (True, True, False)
        atoms.positions += 0.01 * n
    used = converted(tmp_path / "a", slab)
    assert used.labels["stress"].count == 9 * used.structures("train") and used.unused_stresses == 0
    for atoms in slab:
        atoms.pbc = False
    unused = converted(tmp_path / "b", slab)
    assert "stress" not in unused.labels and unused.unused_stresses == 20
    assert any("the stress of 20 structures is not used" in text for text in unused.warnings)


def test_sentences_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_FRAMES", 16)
    monkeypatch.setattr("hydrazero.shards.convert.duplicates_and_order.CHUNK_FRAMES", 16)
    frames = scaled(trajectory(60), forces=-1.0, stress=1 / units.GPa)
    again = relabelled(frames[:5], lambda _, labels: {**labels, "energy": labels["energy"] + 1})
    one = converted(tmp_path / "a", frames, again)
    monkeypatch.setattr(reading, "SLICED_BYTES", 0)
    monkeypatch.setattr("hydrazero.shards.convert.convert.SLICED_BYTES", 0)
    with ThreadPoolExecutor(3) as executor:
        three = converted(tmp_path / "b", frames, again, workers=Workers(executor=executor, count=3))
    assert one.warnings == three.warnings and len(one.warnings) == 3
    assert (tmp_path / "a/out/manifest.json").read_bytes() == (tmp_path / "b/out/manifest.json").read_bytes()


def test_manifests_without_the_sentences_are_read(tmp_path):
    import json

    converted(tmp_path, [labelled(molecule("H2O"))] * 3 + molecules(20))
    path = tmp_path / "out" / "manifest.json"
    document = json.loads(path.read_text())
    for key in ("warnings", "references", "isolated_atoms", "undetermined_sums", "unused_stresses"):
        del document[key]
    path.write_text(json.dumps(document))
    old = read_manifest(tmp_path / "out")
    assert old.warnings == [] and old.references == "fit" and old.undetermined_sums == []
    assert ase.io.read(tmp_path / "a.extxyz", 0).get_chemical_formula() == "H2O"


def test_units_that_a_file_states_are_named(tmp_path):
    frames = molecules(40)
    small = [atoms for atoms in frames if len(atoms) == 3]
    positions = np.array([atoms.positions for atoms in small])
    arrays = {
        "z": small[0].numbers,
        "R": positions,
        "E": np.full(len(small), -479000.0),
        "F": np.full(positions.shape, 40),
    }
    np.savez(tmp_path / "a.npz", e_unit="kcal/mol", r_unit="Bohr", **arrays)
    found = convert([tmp_path / "a.npz"], "t", tmp_path / "out", ConvertSettings()).warnings
    (energy,) = [text for text in found if "energies are improbable" in text or "all-electron energy" in text]
    assert "too low to be in kcal/mol: that of a.npz#0 is" in energy


@pytest.mark.parametrize(
    ("factor", "cause"), [(8, "as if they were divided by the number of atoms"), (5, "which no change")]
)
def test_half_of_the_energies_are_of_another_kind(tmp_path, factor, cause):
    frames = relabelled(trajectory(40), lambda _, labels: {**labels, "energy": labels["energy"] - 3700.0})
    assert converted(tmp_path / "right", frames).warnings == []
    mixed = relabelled(frames, lambda n, labels: {**labels, "energy": labels["energy"] / (factor if n < 20 else 1)})
    (warning,) = converted(tmp_path / "mixed", mixed).warnings
    assert warning.startswith("the energies of 20 structures of the same 8 atoms, such as a.extxyz#0, are smaller by a")
    assert "than those of 20 others, such as a.extxyz#20" in warning and cause in warning
