"""Presets of the large open datasets, each on a miniature in that dataset's real layout, through the command line."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io.trajectory import Trajectory
from click.testing import CliRunner, Result

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.presets import load_preset, preset_names
from hydrazero.shards.manifest import SPLITS, read_manifest
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.structure import Structure

h5py = pytest.importorskip("h5py")
pytest.importorskip("lmdb")
pytest.importorskip("ijson")

COUNT = 12
"""Good structures of each miniature, so that some fall into the training split."""


def energy_of(number: int) -> float:
    return -100.0 - number


def forces_of(atoms: int, number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((atoms, 3))


def waters(count: int = COUNT) -> list[Atoms]:
    frames = []
    for number in range(count):
        atoms = molecule("H2O")
        atoms.rattle(0.05, seed=number)
        frames.append(atoms)
    return frames


def convert(preset: str, out: Path, *sources: Path, options: tuple[str, ...] = ("--skip-bad",)) -> Result:
    files = [str(source) for source in sources]
    return CliRunner().invoke(main, ["convert", *files, "--preset", preset, "--out", str(out), *options])


def converted(preset: str, out: Path, *sources: Path) -> dict[str, Structure]:
    """Structures of all splits by their source ids."""
    result = convert(preset, out, *sources)
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = {}
    for split in SPLITS:
        reader = BlockReader(out, split)
        for number in range(len(reader)):
            block = reader.read(number)
            found |= {block.names[row]: block.structure(row) for row in range(len(block))}
    return found


def write_ani1x(folder: Path) -> Path:
    """Groups by formula, NaN where a label was not computed; an atom of its own; one conformer with a NaN position."""
    path = folder / "ani1x-release.h5"
    with h5py.File(path, "w") as file:
        for formula, frames in (("H2O1", waters()), ("H1", [Atoms("H")])):
            group = file.create_group(formula)
            group["atomic_numbers"] = frames[0].numbers.astype(np.uint8)
            positions = np.array([f.positions for f in frames])
            energies = np.array([energy_of(n) for n in range(len(frames))])
            forces = np.array([forces_of(len(f), n) for n, f in enumerate(frames)])
            if formula == "H2O1":
                forces[3], energies[4], positions[5, 0, 0] = np.nan, np.nan, np.nan
            group["coordinates"] = positions.astype(np.float32)
            group["wb97x_dz.energy"], group["wb97x_dz.forces"] = energies, forces.astype(np.float32)
            group["wb97x_dz.dipole"] = np.zeros((len(frames), 3))
    return path


def test_ani1x(tmp_path):
    found = converted("ani1x", tmp_path / "out", write_ani1x(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"no_energy": 1, "no_forces": 1, "non_finite_positions": 1}
    assert len(found) == COUNT + 1 - 3 and len(found["ani1x-release.h5#H1/0"]) == 1
    water = found["ani1x-release.h5#H2O1/2"]
    assert water.energy == energy_of(2) * units.Hartree
    np.testing.assert_allclose(water.forces, forces_of(3, 2) * units.Hartree, rtol=1e-6)
    np.testing.assert_allclose(water.positions, waters()[2].positions, atol=1e-6)


def write_qm7x(folder: Path) -> Path:
    """Molecule / conformer, compressed; an energy that is an array of one; one conformer with a wrong element."""
    plain = folder / "1000.h5"
    with h5py.File(plain, "w") as file:
        for number, atoms in enumerate(waters()):
            group = file.create_group(f"{1 + number}/Geom-m{1 + number}-i1-c1-opt")
            group["atNUM"] = atoms.numbers if number != 7 else np.array([8, 1, 200])
            group["atXYZ"] = atoms.positions
            group["ePBE0+MBD"], group["totFOR"] = [energy_of(number)], forces_of(3, number)
            group["sRMSD"] = [0.0]
    packed = folder / "1000.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    return packed


def test_qm7x(tmp_path):
    found = converted("qm7x", tmp_path / "out", write_qm7x(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"unknown_element": 1} and len(found) == COUNT - 1
    water = found["1000.xz#3/Geom-m3-i1-c1-opt"]
    assert water.energy == energy_of(2)
    np.testing.assert_allclose(water.forces, forces_of(3, 2), rtol=1e-6)


def write_transition1x(folder: Path) -> Path:
    """Split / formula / reaction; splits link to 'data', each reaction has its end points in groups of their own."""
    path = folder / "Transition1x.h5"
    with h5py.File(path, "w") as file:
        for reaction in range(4):
            group = file.create_group(f"data/H2O1/rxn{reaction:04d}")
            frames = waters()[3 * reaction : 3 * reaction + 3]
            numbers = range(3 * reaction, 3 * reaction + 3)
            for target, members in ((group, [0, 1, 2]), (group.create_group("transition_state"), [1])):
                target["atomic_numbers"] = frames[0].numbers
                target["positions"] = np.array([frames[m].positions for m in members])
                target["wB97x_6-31G(d).energy"] = np.array([energy_of(numbers[m]) for m in members])
                target["wB97x_6-31G(d).forces"] = np.array([forces_of(3, numbers[m]) for m in members])
            file.require_group("train/H2O1")[f"rxn{reaction:04d}"] = h5py.SoftLink(f"/data/H2O1/rxn{reaction:04d}")
    return path


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


def pymatgen_dict(atoms: Atoms) -> dict[str, Any]:
    sites = [
        {"species": [{"element": s, "occu": 1}], "abc": list(abc), "xyz": list(xyz), "properties": {}}
        for s, abc, xyz in zip(atoms.symbols, atoms.get_scaled_positions(wrap=False), atoms.positions, strict=True)
    ]
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": 0,
        "lattice": {"matrix": atoms.cell[:].tolist(), "pbc": [True, True, True]},
        "sites": sites,
    }


def crystals(count: int = COUNT) -> list[Atoms]:
    frames = []
    for number in range(count):
        atoms = bulk("Cu", cubic=True) if number % 3 else bulk("Ni")
        atoms.rattle(0.02, seed=number)
        frames.append(atoms)
    return frames


VASP_STRESS = np.array([[10.0, 1.0, 2.0], [1.0, 20.0, 3.0], [2.0, 3.0, 30.0]])
"""kbar, positive under compression."""

ASE_STRESS = -VASP_STRESS * 0.1 * units.GPa


def write_mptrj(folder: Path) -> Path:
    """Material -> frame; the last has no force, and every other one no magnetic moments."""
    document: dict[str, Any] = {}
    for number, atoms in enumerate(crystals()):
        entry = {
            "structure": pymatgen_dict(atoms),
            "uncorrected_total_energy": energy_of(number),
            "corrected_total_energy": energy_of(number) - 1,
            "energy_per_atom": 0.0,
            "force": forces_of(len(atoms), number).tolist(),
            "stress": VASP_STRESS.tolist(),
            "magmom": [-0.5 * number] * len(atoms) if number % 2 else None,
            "bandgap": 0.0,
            "mp_id": f"mp-{number // 3}",
        }
        if number == COUNT - 1:
            del entry["force"]
        document.setdefault(f"mp-{number // 3}", {})[f"mp-{number // 3}-0-{number}"] = entry
    path = folder / "MPtrj_2022.9_full.json"
    path.write_text(json.dumps(document))
    return path


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


def write_alexandria(folder: Path) -> list[Path]:
    """Entries of relaxed crystals, with forces at the sites, and a path of steps.

    Entry 5 has no forces, 7 has them at some of its sites, the last is no crystal; one site of a step is shared.
    """
    entries: list[Any] = [
        {
            "@class": "ComputedStructureEntry",
            "energy": energy_of(number),
            "composition": {"Cu": 4.0},
            "correction": 0.0,
            "data": {"mat_id": f"agm{number:09d}", "spg": 225, "stress": VASP_STRESS.tolist(), "energy_corrected": 0.0},
            "structure": pymatgen_dict(atoms),
        }
        for number, atoms in enumerate(crystals())
    ]
    for number, entry in enumerate(entries):
        sites = entry["structure"]["sites"]
        if number == 5:
            continue
        for site, force in zip(sites, forces_of(len(sites), number).tolist(), strict=True):
            site["properties"] = {"magmom": 0.0, "charge": 0.1, "forces": force}
    del entries[7]["structure"]["sites"][2]["properties"]["forces"]
    entries.append({"energy": 1.0, "structure": "lost"})
    first = folder / "alexandria_000.json.bz2"
    first.write_bytes(bz2.compress(json.dumps({"entries": entries}).encode()))
    steps = [
        {
            "structure": pymatgen_dict(atoms),
            "energy": energy_of(100 + number),
            "forces": forces_of(len(atoms), number).tolist(),
            "stress": VASP_STRESS.tolist(),
        }
        for number, atoms in enumerate(crystals()[:4])
    ]
    for step in steps:
        for site in step["structure"]["sites"]:  # type: ignore[index]
            site["abc"] = [value + 0.01 for value in site["abc"]]
    steps[2]["structure"]["sites"][0]["species"][0]["occu"] = 0.5  # type: ignore[index]
    second = folder / "alexandria_geo_opt_000.json.bz2"
    second.write_bytes(bz2.compress(json.dumps({"agm000000001": [{"kpoints": [1], "steps": steps}]}).encode()))
    return [first, second]


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


def slabs(count: int = COUNT) -> list[Atoms]:
    frames = []
    for number in range(count):
        atoms = fcc111("Cu", (1, 1, 3), vacuum=6.0)
        atoms.pbc = True
        atoms.rattle(0.03, seed=number)
        atoms.calc = SinglePointCalculator(atoms, energy=energy_of(number), forces=forces_of(3, number))
        atoms.set_tags([0, 0, 1])
        frames.append(atoms)
    return frames


def extxyz_bytes(frames: list[Atoms]) -> bytes:
    buffer = io.StringIO()
    for atoms in frames:
        fixed = atoms.copy()
        fixed.calc = SinglePointCalculator(fixed, **atoms.calc.results)
        fixed.set_constraint(FixAtoms([0]))
        ase.io.write(buffer, fixed, format="extxyz", columns=["symbols", "positions", "tags", "move_mask", "forces"])
    return buffer.getvalue().encode()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_oc20(folder: Path) -> Path:
    """A tar of two compressed trajectories, texts of references beside them; one line of the second is damaged."""
    path = folder / "s2ef_train_200K.tar"
    frames = slabs()
    with tarfile.open(path, "w") as tar:
        for part in range(2):
            members = frames[6 * part : 6 * part + 6]
            lines = [f"random{(6 * part + n) // 2},frame{n},{-40.5 - n}" for n in range(6)]
            if part == 1:
                lines[2] = "random4,frame2"
            add_member(tar, f"s2ef_train_200K/{part}.extxyz.xz", lzma.compress(extxyz_bytes(members)))
            add_member(tar, f"s2ef_train_200K/{part}.txt.xz", lzma.compress("\n".join(lines).encode()))
    return path


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


def write_tar(folder: Path) -> Path:
    path = folder / "oc22.tar.gz"
    data = extxyz_bytes(slabs()).replace(b"energy=-107.0", b"energy=nan")
    with tarfile.open(path, "w:gz") as tar:
        add_member(tar, "oc22/0.extxyz", data)
        add_member(tar, "oc22/1.extxyz", extxyz_bytes(slabs(3)[::-1]))
    return path


@pytest.mark.parametrize("preset", ["oc22", "odac23"])
def test_tars_of_extxyz(tmp_path, preset):
    config = tmp_path / "one.toml"
    config.write_text("[split]\ntrain = 1.0\nval = 0.0\ntest = 0.0\n")
    result = convert(preset, tmp_path / "out", write_tar(tmp_path), options=("--skip-bad", "--config", str(config)))
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.set_aside == {"no_energy": 1} and manifest.structures() == COUNT - 1 + 3


def write_aselmdb(folder: Path, frames: list[tuple[Atoms, dict[str, Any]]]) -> Path:
    folder.mkdir()
    half = len(frames) // 2
    for name, part in (("data0000.aselmdb", frames[:half]), ("data0001.aselmdb", frames[half:])):
        with ase.db.connect(str(folder / name), type="aselmdb") as database:
            for atoms, data in part:
                database.write(atoms, data=data)
    return folder


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


def write_nabla2dft(folder: Path) -> Path:
    path = folder / "train_2k_energy.db"
    with ase.db.connect(str(path)) as database:
        for number, atoms in enumerate([*waters(), Atoms("Br")]):
            data = {"energy": np.array([energy_of(number)]), "forces": forces_of(len(atoms), number)}
            if number == 5:
                data["forces"] = data["forces"][:2]
            database.write(atoms, data=data, moses_id=number // 3, conformation_id=number)
    return path


def test_nabla2dft(tmp_path):
    found = converted("nabla2dft", tmp_path / "out", write_nabla2dft(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"forces_shape": 1} and len(found) == COUNT
    frame = found["train_2k_energy.db#3"]
    assert frame.energy == energy_of(2) * units.Hartree
    np.testing.assert_allclose(frame.forces, forces_of(3, 2) * units.Hartree, rtol=1e-6)


def qcml_records() -> list[dict[str, Any]]:
    records = []
    for number, atoms in enumerate([*waters(), Atoms("He")]):
        records.append(
            {
                "key_hash": bytes([number]),
                "atomic_numbers": atoms.numbers.astype(np.uint8),
                "positions": atoms.positions / units.Bohr,
                "charge": -1 if number == 4 else 0,
                "multiplicity": 2 if number == 4 else 1,
                "pbe0_energy": energy_of(number),
                "pbe0_forces": forces_of(len(atoms), number),
                "is_outlier": False,
            }
        )
    records[6]["charge"] = 100_000
    return records


def write_qcml_parquet(folder: Path) -> Path:
    rows = [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in record.items()}
        for record in qcml_records()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "dft_force_field-00000.parquet")
    return folder / "dft_force_field-00000.parquet"


def test_qcml_parquet(tmp_path):
    found = converted("qcml", tmp_path / "out", write_qcml_parquet(tmp_path))
    assert read_manifest(tmp_path / "out").set_aside == {"bad_charge": 1} and len(found) == COUNT
    check_qcml(found["dft_force_field-00000.parquet#4"])


def check_qcml(anion: Structure) -> None:
    assert (anion.charge, anion.multiplicity) == (-1, 2) and anion.energy == energy_of(4) * units.Hartree
    np.testing.assert_allclose(anion.positions, waters()[4].positions, atol=1e-6)
    np.testing.assert_allclose(anion.forces, forces_of(3, 4) * units.Hartree / units.Bohr, rtol=1e-6)


def test_qcml_npz(tmp_path):
    records = qcml_records()
    arrays = {key: np.array([r[key] for r in records]) for key in ("charge", "multiplicity", "pbe0_energy")}
    arrays |= {key: np.concatenate([r[key] for r in records]) for key in ("atomic_numbers", "positions", "pbe0_forces")}
    np.savez(tmp_path / "part.npz", n_atoms=[len(r["atomic_numbers"]) for r in records], **arrays)
    found = converted("qcml", tmp_path / "out", tmp_path / "part.npz")
    assert read_manifest(tmp_path / "out").set_aside == {"bad_charge": 1} and len(found) == COUNT
    check_qcml(found["part.npz#4"])


WRITERS: dict[str, Callable[[Path], Any]] = {
    "ani1x": write_ani1x,
    "qm7x": write_qm7x,
    "transition1x": write_transition1x,
    "mptrj": write_mptrj,
    "alexandria": lambda folder: write_alexandria(folder)[0],
    "oc20": write_oc20,
    "nabla2dft": write_nabla2dft,
    "qcml": write_qcml_parquet,
}

LIKE = {"oc22": {"oc20"}, "odac23": {"oc20"}}
"""Preset -> datasets whose files are laid out as its own."""


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
