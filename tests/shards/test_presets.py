"""Presets of the large open datasets, each on a miniature in that dataset's real layout, through the command line."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io.trajectory import Trajectory
from click.testing import CliRunner
from preset_files import (
    ASE_STRESS,
    COUNT,
    LIKE,
    WRITERS,
    add_member,
    check_qcml,
    convert,
    converted,
    crystals,
    energy_of,
    extxyz_bytes,
    forces_of,
    h5py,
    qcml_records,
    slabs,
    waters,
    write_alexandria,
    write_ani1x,
    write_aselmdb,
    write_mptrj,
    write_nabla2dft,
    write_oc20,
    write_qcml_parquet,
    write_qm7x,
    write_tar,
    write_transition1x,
)

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.presets import load_preset, preset_names
from hydrazero.shards.manifest import SPLITS, read_manifest
from hydrazero.shards.stream.block_reader import BlockReader


def test_ani1x(tmp_path):
    found = converted("ani1x", tmp_path / "out", write_ani1x(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"no_energy": 1, "no_forces": 1, "non_finite_positions": 1}
    assert len(found) == COUNT + 1 - 3 and len(found["ani1x-release.h5#H1/0"]) == 1
    water = found["ani1x-release.h5#H2O1/2"]
    assert water.energy == energy_of(2) * units.Hartree
    np.testing.assert_allclose(water.forces, forces_of(3, 2) * units.Hartree, rtol=1e-6)
    np.testing.assert_allclose(water.positions, waters()[2].positions, atol=1e-6)


def test_qm7x(tmp_path):
    found = converted("qm7x", tmp_path / "out", write_qm7x(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"unknown_element": 1} and len(found) == COUNT - 1
    water = found["1000.xz#3/Geom-m3-i1-c1-opt"]
    assert water.energy == energy_of(2)
    np.testing.assert_allclose(water.forces, forces_of(3, 2), rtol=1e-6)


def test_transition1x(tmp_path):
    found = converted("transition1x", tmp_path / "out", write_transition1x(tmp_path))
    manifest = read_manifest(tmp_path / "out")
    assert len(found) == 12 and manifest.duplicate_count == 4
    frame = found["Transition1x.h5#data/H2O1/rxn0002/1"]
    assert frame.energy == energy_of(7)
    splits: dict[str, set[str]] = {}
    for split in SPLITS:
        reader = BlockReader(tmp_path / "out", split)
        for number in range(len(reader)):
            for name in reader.read(number).names:
                splits.setdefault(name.split("/")[2], set()).add(split)
    assert len(splits) == 4 and all(len(found) == 1 for found in splits.values())


def test_mptrj(tmp_path):
    found = converted("mptrj", tmp_path / "out", write_mptrj(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"no_forces": 1} and len(found) == COUNT - 1
    frame = found["MPtrj_2022.9_full.json#mp-1/mp-1-0-4"]
    assert frame.energy == energy_of(4) and frame.pbc.all()
    np.testing.assert_allclose(frame.stress, ASE_STRESS, rtol=1e-6)
    np.testing.assert_allclose(frame.positions, crystals()[4].positions, atol=1e-5)
    assert frame.atom_targets == {}
    magnetic = found["MPtrj_2022.9_full.json#mp-1/mp-1-0-5"]
    np.testing.assert_array_equal(magnetic.atom_targets["magmom"], [2.5] * len(magnetic))
    assert read_manifest(tmp_path / "out").targets["magmom"].unit == "µB"


def test_mptrj_without_magnetic_moments(tmp_path):
    path = write_mptrj(tmp_path)
    document = json.loads(path.read_text())
    for entry in (entry for frames in document.values() for entry in frames.values()):
        entry["magmom"] = None
    path.write_text(json.dumps(document))
    assert len(converted("mptrj", tmp_path / "out", path)) == COUNT - 1
    assert read_manifest(tmp_path / "out").targets == {}


def test_alexandria(tmp_path):
    found = converted("alexandria", tmp_path / "out", *write_alexandria(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"disordered": 1, "forces_shape": 1, "unreadable": 1}
    assert len(found) == COUNT - 1 + 3
    assert found["alexandria_000.json.bz2#5"].forces is None
    entry = found["alexandria_000.json.bz2#4"]
    assert entry.energy == energy_of(4)
    np.testing.assert_allclose(entry.forces, forces_of(len(entry), 4), rtol=1e-6)
    np.testing.assert_allclose(entry.stress, ASE_STRESS, rtol=1e-6)
    step = found["alexandria_geo_opt_000.json.bz2#agm000000001/0/1"]
    assert step.energy == energy_of(101)
    np.testing.assert_allclose(step.stress, ASE_STRESS, rtol=1e-6)
    np.testing.assert_allclose(step.forces, forces_of(len(step), 1), rtol=1e-6)


def test_oc20(tmp_path):
    source = write_oc20(tmp_path)
    found = converted("oc20", tmp_path / "out", source)
    assert read_manifest(tmp_path / "out").set_aside == {"no_reference": 1} and len(found) == COUNT - 1
    frame = found["s2ef_train_200K.tar/s2ef_train_200K/0.extxyz.xz#3"]
    assert frame.energy == pytest.approx(energy_of(3), abs=1e-9)
    # The fixed atom keeps its force.
    np.testing.assert_allclose(frame.forces, forces_of(3, 3), atol=1e-6)
    config = tmp_path / "adsorption.toml"
    config.write_text('[fields]\nenergy = "adsorption_energy"\n')
    result = convert("oc20", tmp_path / "adsorption", source, options=("--skip-bad", "--config", str(config)))
    assert result.exit_code == 0, result.stderr
    names, energies = [], []
    for split in SPLITS:
        reader = BlockReader(tmp_path / "adsorption", split)
        for number in range(len(reader)):
            names += reader.read(number).names
            energies += reader.read(number).energy.tolist()
    of = dict(zip(names, energies, strict=True))
    assert of["s2ef_train_200K.tar/s2ef_train_200K/0.extxyz.xz#3"] == pytest.approx(energy_of(3) + 43.5, abs=1e-9)


@pytest.mark.parametrize("preset", ["oc22", "odac23"])
def test_tars_of_extxyz(tmp_path, preset):
    config = tmp_path / "one.toml"
    config.write_text("[split]\ntrain = 1.0\nval = 0.0\ntest = 0.0\n")
    result = convert(preset, tmp_path / "out", write_tar(tmp_path), options=("--skip-bad", "--config", str(config)))
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.set_aside == {"no_energy": 1} and manifest.structures() == COUNT - 1 + 3


def test_omat24(tmp_path):
    frames = []
    for number, atoms in enumerate(crystals()):
        forces = forces_of(len(atoms), number)
        stress = np.array([0.1, 0.2, 0.3, 0.01, 0.02, 0.03])
        if number == 5:
            forces[0, 0] = np.inf
        atoms.calc = SinglePointCalculator(atoms, energy=energy_of(number), forces=forces, stress=stress)
        frames.append((atoms, {"sid": f"agm{number}"}))
    for preset in ("omat24", "oc25"):
        folder = write_aselmdb(tmp_path / preset, frames)
        found = converted(preset, tmp_path / f"out-{preset}", folder)
        assert read_manifest(tmp_path / f"out-{preset}").set_aside == {"non_finite_forces": 1}
        frame = found["data0000.aselmdb#3"]
        assert frame.energy == energy_of(2) and frame.stress is not None
        np.testing.assert_allclose(frame.stress[1, 2], 0.01, rtol=1e-6)  # yz comes fourth in ASE's order


@pytest.mark.parametrize("preset", ["omol25-neutral", "omol25-charged", "opoly26"])
def test_molecules_with_charge_and_spin(tmp_path, preset):
    frames = []
    for number, atoms in enumerate([*waters(), Atoms("Na"), *waters(4)]):
        atoms.positions[:, 2] += 0.001 * number
        atoms.calc = SinglePointCalculator(atoms, energy=energy_of(number), forces=forces_of(len(atoms), number))
        charge = 1 if number % 2 else 0
        frames.append(
            (atoms, {"charge": charge, "spin": 2 if charge else 1, "source": f"x/{number}", "data_id": "water"})
        )
    frames[3][1]["spin"] = 1.5
    found = converted(preset, tmp_path / "out", write_aselmdb(tmp_path / "train", frames))
    manifest = read_manifest(tmp_path / "out")
    charges = {structure.charge for structure in found.values()}
    expected = {"omol25-neutral": {0}, "omol25-charged": {1}, "opoly26": {0, 1}}[preset]
    assert charges == expected
    assert {s.multiplicity for s in found.values()} == {2 if charge else 1 for charge in expected}
    assert manifest.set_aside.get("bad_multiplicity", 0) == (preset != "omol25-neutral")
    assert manifest.charged_structures == sum(s.charge != 0 for s in found.values())
    assert any(len(s) == 1 for s in found.values()) == (preset != "omol25-charged")


def test_nabla2dft(tmp_path):
    found = converted("nabla2dft", tmp_path / "out", write_nabla2dft(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"forces_shape": 1} and len(found) == COUNT
    frame = found["train_2k_energy.db#3"]
    assert frame.energy == energy_of(2) * units.Hartree
    np.testing.assert_allclose(frame.forces, forces_of(3, 2) * units.Hartree, rtol=1e-6)


def test_qcml_parquet(tmp_path):
    found = converted("qcml", tmp_path / "out", write_qcml_parquet(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"bad_charge": 1} and len(found) == COUNT
    check_qcml(found["dft_force_field-00000.parquet#4"])


def test_qcml_npz(tmp_path):
    records = qcml_records()
    arrays = {key: np.array([r[key] for r in records]) for key in ("charge", "multiplicity", "pbe0_energy")}
    arrays |= {key: np.concatenate([r[key] for r in records]) for key in ("atomic_numbers", "positions", "pbe0_forces")}
    np.savez(tmp_path / "part.npz", n_atoms=[len(r["atomic_numbers"]) for r in records], **arrays)
    found = converted("qcml", tmp_path / "out", tmp_path / "part.npz")
    assert read_manifest(tmp_path / "out").set_aside == {"bad_charge": 1} and len(found) == COUNT
    check_qcml(found["part.npz#4"])


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_on_another_datasets_file(tmp_path, preset):
    for other in WRITERS.keys() - {preset} - LIKE.get(preset, set()):
        folder = tmp_path / other
        folder.mkdir()
        result = convert(preset, tmp_path / "out", WRITERS[other](folder), options=())
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (other, result.exception)
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert len(lines) == 1 and "b'" not in lines[0] and "\\x" not in lines[0], (other, lines)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.part*")), other


@pytest.mark.parametrize(
    ("preset", "other", "missing"),
    [
        ("ani1x", "qm7x", "no group with 'atomic_numbers' and 'coordinates'"),
        ("qm7x", "transition1x", "no group with 'atNUM' and 'atXYZ'"),
        ("transition1x", "ani1x", "no group with 'atomic_numbers' and 'positions'"),
        ("mptrj", "alexandria", "'entries' is not an object of frames"),
        ("alexandria", "mptrj", "'mp-0' has no 'steps'"),
    ],
)
def test_a_like_format_of_another_dataset_is_told_by_its_keys(tmp_path, preset, other, missing):
    result = convert(preset, tmp_path / "out", WRITERS[other](tmp_path))
    assert result.exit_code == 1 and missing in result.stderr, result.stderr


def test_frames_of_molecules_are_no_omat24(tmp_path):
    frames = []
    for number, atoms in enumerate(waters()):
        atoms.calc = SinglePointCalculator(atoms, energy=energy_of(number), forces=forces_of(3, number))
        frames.append((atoms, {"charge": 0, "spin": 1}))
    result = convert("omat24", tmp_path / "out", write_aselmdb(tmp_path / "train", frames), options=())
    assert result.exit_code == 1 and "the frame has no stress (field 'stress')" in result.stderr


def test_crystals_are_no_opoly26(tmp_path):
    frames = []
    for number, atoms in enumerate(crystals()):
        atoms.calc = SinglePointCalculator(atoms, energy=energy_of(number), forces=forces_of(len(atoms), number))
        frames.append((atoms, {"sid": f"agm{number}"}))
    result = convert("opoly26", tmp_path / "out", write_aselmdb(tmp_path / "train", frames), options=())
    assert result.exit_code == 1 and "the frame has no charge (field 'charge')" in result.stderr


def test_folders_of_files_with_unlike_suffixes(tmp_path):
    """QM7-X's 1000.xz, beside a text; OC22's trajectories, whose fixed atoms keep their forces."""
    qm7x = tmp_path / "qm7x"
    qm7x.mkdir()
    (qm7x / "README.txt").write_text("no HDF5")
    packed = write_qm7x(qm7x)
    packed.with_suffix(".h5").unlink()
    assert len(converted("qm7x", tmp_path / "out", qm7x)) == COUNT - 1
    oc22 = tmp_path / "raw_trajs"
    oc22.mkdir()
    for part in range(4):
        with Trajectory(oc22 / f"{part}.traj", "w") as file:
            for atoms in slabs()[3 * part : 3 * part + 3]:
                atoms.set_constraint(FixAtoms([0]))
                file.write(atoms)
    found = converted("oc22", tmp_path / "out22", oc22)
    assert len(found) == COUNT
    np.testing.assert_allclose(found["2.traj#1"].forces, forces_of(3, 7), atol=1e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_a_malformed_entry_stops_with_one_sentence(tmp_path, name):
    source = WRITERS[name](tmp_path)
    if name == "transition1x":
        with h5py.File(source, "a") as file:
            file["data/H2O1/rxn0000/positions"][0, 0] = np.nan
    result = convert(name, tmp_path / "out", source, options=())
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert result.exit_code == 1 and len(lines) == 1 and "with --skip-bad" in lines[0], lines


def test_presets_are_listed():
    result = CliRunner().invoke(main, ["convert", "--list-presets"])
    assert result.exit_code == 0
    for name in preset_names():
        about = load_preset(name).about
        assert all(fact in result.stdout for fact in (name, about.elements, about.theory, about.download))
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_an_unknown_preset_is_refused(tmp_path):
    result = convert("mptraj", tmp_path / "out", tmp_path)
    assert result.exit_code == 1 and "did you mean 'mptrj'?" in result.stderr


@pytest.mark.parametrize("name", ["../../evil.extxyz", "/etc/evil.extxyz"])
def test_members_outside_of_the_archive_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, name, extxyz_bytes(slabs(2)))
    result = convert("oc22", tmp_path / "out", tmp_path / "a.tar")
    assert result.exit_code == 1 and f"member '{name}' whose path leads out of it" in result.stderr


@pytest.mark.parametrize("name", ["qm7x", "alexandria", "oc20"])
def test_compressed_files_that_end_early(tmp_path, name):
    source = WRITERS[name](tmp_path)
    source.write_bytes(source.read_bytes()[: int(0.4 * source.stat().st_size)])
    result = convert(name, tmp_path / "out", source)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert result.exit_code == 1 and len(lines) == 1 and "copy it again" in lines[0], result.stderr
