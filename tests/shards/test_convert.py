"""Conversion: nothing lost, nothing changed, duplicates in one split, the same bytes each time, all or nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_shards, metals, molecules, write_extxyz

from hydrazero.shards.block import block_from_structures
from hydrazero.shards.convert.references import reference_energies
from hydrazero.shards.convert.settings import SplitSection, load_convert_settings
from hydrazero.shards.convert.splits import split_of
from hydrazero.shards.convert.task_statistics import Statistics
from hydrazero.shards.manifest import SPLITS, read_manifest
from hydrazero.shards.readers import ReadSettings, read_frames
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.structure import Structure


def all_structures(folder: Path) -> dict[str, list[Structure]]:
    found: dict[str, list[Structure]] = {}
    for split in SPLITS:
        reader = BlockReader(folder, split)
        blocks = [reader.read(number) for number in range(len(reader))]
        found[split] = [block.structure(row) for block in blocks for row in range(len(block))]
    return found


def test_every_frame_arrives_once_with_its_values(tmp_path):
    frames = molecules(30) + metals(30)
    folder = make_shards(tmp_path, "mixed", frames, float_dtype="float64")
    source = list(read_frames(tmp_path / "mixed.extxyz", ReadSettings()))
    expected = {frame.source_id: frame.structure for frame in source}
    arrived = [s for part in all_structures(folder).values() for s in part]
    assert Counter(s.source_id for s in arrived) == Counter(expected.keys())
    for structure in arrived:
        original = expected[structure.source_id]
        assert structure.energy == original.energy  # to the last digit
        for name in ("numbers", "positions", "forces", "cell", "pbc"):
            np.testing.assert_array_equal(getattr(structure, name), getattr(original, name))
        assert (structure.stress is None) == (original.stress is None)
        if structure.stress is not None:
            np.testing.assert_array_equal(structure.stress, original.stress)


def test_labels_of_the_source_survive_the_reader(tmp_path):
    frames = metals(3)
    path = write_extxyz(tmp_path / "a.extxyz", frames)
    for atoms, frame in zip(frames, read_frames(path, ReadSettings()), strict=True):
        assert frame.structure.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(frame.structure.forces, atoms.get_forces(), atol=1e-7)
        np.testing.assert_allclose(frame.structure.stress, atoms.get_stress(voigt=False), atol=1e-7)


def test_field_names_units_and_virial(tmp_path):
    atoms = Atoms("OH", positions=[[0, 0, 0], [0, 0, 1.0]], cell=[4, 5, 6], pbc=True)
    atoms.info.update(TotEnergy=-2.0, vir=np.arange(9.0).reshape(3, 3))
    atoms.arrays["grad"] = np.array([[0.0, 0, 1], [0, 0, -1]])
    path = write_extxyz(tmp_path / "a.xyz", [atoms])
    config = tmp_path / "c.toml"
    config.write_text(
        '[fields]\nenergy = "TotEnergy"\nforces = "grad"\nvirial = "vir"\n'
        '[units]\nenergy = "Hartree"\nforces = "Hartree/Bohr"\nlength = "Bohr"\n'
    )
    (frame,) = read_frames(path, load_convert_settings(config).read_settings())
    structure = frame.structure
    assert structure.energy == pytest.approx(-2.0 * units.Hartree, rel=1e-12)
    assert structure.forces[0, 2] == pytest.approx(units.Hartree / units.Bohr, rel=1e-12)
    assert structure.positions[1, 2] == pytest.approx(units.Bohr, rel=1e-12)
    virial = np.arange(9.0).reshape(3, 3)
    expected = -0.5 * (virial + virial.T) * units.Hartree / (120 * units.Bohr**3)
    np.testing.assert_allclose(structure.stress, expected, rtol=1e-10)


def test_npz_and_database(tmp_path):
    rng = np.random.default_rng(0)
    positions = np.array([[0, 0, 0.1], [0.76, 0, -0.5], [-0.76, 0, -0.5]]) + 0.05 * rng.standard_normal((5, 3, 3))
    for names in (["z", "R", "E", "F"], ["nuclear_charges", "coords", "energies", "forces"]):
        values = (np.array([8, 1, 1]), positions, np.arange(5.0).reshape(5, 1), positions)
        np.savez(tmp_path / "a.npz", **dict(zip(names, values, strict=True)))
        frames = list(read_frames(tmp_path / "a.npz", ReadSettings(require=("energy", "forces"))))
        assert [frame.structure.energy for frame in frames] == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(frames[2].structure.forces, positions[2])
    with ase.db.connect(tmp_path / "a.db") as database:
        for atoms in metals(4):
            database.write(atoms, tag="x")
    frames = list(read_frames(tmp_path / "a.db", ReadSettings(require=("energy", "forces", "stress"))))
    assert len(frames) == 4 and all(frame.structure is not None for frame in frames)
    assert frames[1].structure.energy == pytest.approx(metals(4)[1].get_potential_energy(), abs=1e-10)
    assert frames[0].info["tag"] == "x"


def test_fixed_atoms_keep_their_forces(tmp_path):
    from ase.constraints import FixAtoms

    (atoms,) = metals(1)
    true_forces = atoms.get_forces(apply_constraint=False).copy()
    atoms.set_constraint(FixAtoms([0]))
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(atoms)
    (frame,) = read_frames(tmp_path / "a.db", ReadSettings())
    np.testing.assert_allclose(frame.structure.forces, true_forces, atol=1e-12)


def test_two_conversions_give_the_same_bytes(tmp_path):
    frames = molecules(300) + metals(20)
    first, second = make_shards(tmp_path / "1", "t", frames), make_shards(tmp_path / "2", "t", frames)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert any(name.startswith("train") for name in names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_isolated_atoms_are_for_training(tmp_path):
    """All molecules have one composition here: only the atoms tell what an element's energy is."""
    atoms = [Atoms(symbol) for symbol in ("H", "C", "O", "N")]
    cells = [Atoms("Ne", cell=[a, a, a], pbc=True) for a in np.linspace(3.0, 5.0, 30)]
    for number, frame in enumerate([*atoms, *cells]):
        frame.calc = SinglePointCalculator(frame, energy=-float(number), forces=np.zeros((1, 3)))
    folder = make_shards(tmp_path, "atoms", [*atoms, *cells], split=SplitSection(train=0.3, val=0.3, test=0.4))
    found = {split: [s.source_id for s in part] for split, part in all_structures(folder).items()}
    assert {f"atoms.extxyz#{n}" for n in range(4)} <= set(found["train"])
    assert found["val"] and found["test"]  # crystals of one atom are samples like others


@pytest.mark.parametrize("what", ["keep", "drop"])
def test_a_duplicate_is_never_in_two_splits(tmp_path, what):
    frames = molecules(60)
    doubled = frames + molecules(60)[::-1]
    for number, atoms in enumerate(doubled):
        atoms.info["run"] = f"run{number}"  # a group key that would tear the pairs apart
    folder = make_shards(tmp_path, "t", doubled, duplicates=what, split=SplitSection(group="info:run"))
    manifest = read_manifest(folder)
    assert manifest.duplicate_count == 60 and len(manifest.duplicates) == 60
    assert manifest.structures() == (120 if what == "keep" else 60)
    places: dict[bytes, set[str]] = {}
    for split, structures in all_structures(folder).items():
        for structure in structures:
            places.setdefault(np.round(structure.positions, 4).tobytes(), set()).add(split)
    assert all(len(splits) == 1 for splits in places.values())
    assert {s for splits in places.values() for s in splits} == set(SPLITS)


def test_groups_stay_together(tmp_path):
    folder = make_shards(
        tmp_path, "t", molecules(80), split=SplitSection(group="composition", train=0.5, val=0.25, test=0.25)
    )
    where: dict[tuple[int, ...], set[str]] = {}
    for split, structures in all_structures(folder).items():
        for s in structures:
            where.setdefault(tuple(sorted(s.numbers)), set()).add(split)
    assert len(where) == 4 and all(len(splits) == 1 for splits in where.values())


@settings(max_examples=30)
@given(st.floats(0.1, 0.9), st.integers(0, 10**6))
def test_split_shares(train, seed):
    rest = (1 - train) / 2
    section = SplitSection(train=train, val=rest, test=1 - train - rest, seed=seed)
    names = Counter(split_of(str(n).encode(), section) for n in range(2000))
    for split, share in (("train", train), ("val", rest), ("test", rest)):
        assert abs(names[split] / 2000 - share) < 0.06
    assert split_of(b"x", section) == split_of(b"x", section)


def test_references_find_known_energies(tmp_path):
    known = {"H": -13.6, "C": -1030.25, "N": -1480.5, "O": -2040.125}
    frames = molecules(40)
    structures = []
    for frame in read_frames(write_extxyz(tmp_path / "a.extxyz", frames), ReadSettings()):
        symbols = frames[len(structures)].get_chemical_symbols()
        structures.append(type(frame.structure)(**{**vars(frame.structure), "energy": sum(known[s] for s in symbols)}))

    def fit(these: list[Structure]) -> dict[str, float]:
        statistics = Statistics()
        # In parts, as shards are: the factors of the parts must give what all rows together give.
        for first in range(0, len(these), 7):
            part = Statistics()
            part.add(block_from_structures(these[first : first + 7], float_dtype="float64"), "train", ())
            statistics.merge(part)
        return reference_energies(statistics.triangle)

    fitted = fit(structures)
    for symbol, energy in known.items():
        assert fitted[symbol] == pytest.approx(energy, abs=1e-6)
    only_water = [s for s in structures if sorted(s.numbers) == [1, 1, 8]]
    sums = fit(only_water)
    assert 2 * sums["H"] + sums["O"] == pytest.approx(2 * known["H"] + known["O"], abs=1e-8)


def test_manifest_facts_are_true(tmp_path):
    folder = make_shards(tmp_path, "t", molecules(50) + metals(10), source={"method": "EMT"})
    manifest = read_manifest(folder)
    structures = [s for part in all_structures(folder).values() for s in part]
    assert manifest.structures() == 60 and manifest.atoms() == sum(len(s) for s in structures)
    assert manifest.size_histogram == Counter(len(s) for s in structures)
    assert manifest.elements["Cu"] == sum(int((s.numbers == 29).sum()) for s in structures)
    assert manifest.periodic_structures == 10 and manifest.source["method"] == "EMT"
    training = np.concatenate([s.forces.reshape(-1) for s in all_structures(folder)["train"]])
    assert manifest.labels["forces"].rms == pytest.approx(float(np.sqrt((training**2).mean())), rel=1e-6)
    assert json.loads((folder / "manifest.json").read_text())["units"]["energy"] == "eV"


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, False)])
def test_coordinates_far_out_keep_their_digits(pbc):
    """An unwrapped trajectory, 10,000 Å out, in float32: distances within a structure to 1e-4 Å."""
    generator = np.random.default_rng(2)
    cell = np.array([[8.0, 0.0, 0.0], [1.0, 9.0, 0.0], [0.0, 2.0, 10.0]])
    near = generator.uniform(0.2, 7.0, (5, 3))
    moved = near + np.array([10_000.0, -20_000.0, 30_000.0])
    moved[2] += 1000 * cell[0] if pbc[0] else 0.0
    made = Structure(numbers=np.full(5, 6, dtype=np.uint8), positions=moved, cell=cell, pbc=np.array(pbc))
    stored = block_from_structures([made]).structure(0)
    ours = Atoms("C5", positions=stored.positions, cell=cell, pbc=pbc).get_all_distances(mic=any(pbc))
    true = Atoms("C5", positions=near, cell=cell, pbc=pbc).get_all_distances(mic=any(pbc))
    np.testing.assert_allclose(ours, true, atol=1e-4)
