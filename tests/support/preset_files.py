"""Small files in the layouts of open datasets."""

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
from click.testing import CliRunner, Result

from hydrazero.launch.cli.main import main
from hydrazero.shards.manifest import SPLITS
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


def write_tar(folder: Path) -> Path:
    path = folder / "oc22.tar.gz"
    data = extxyz_bytes(slabs()).replace(b"energy=-107.0", b"energy=nan")
    with tarfile.open(path, "w:gz") as tar:
        add_member(tar, "oc22/0.extxyz", data)
        add_member(tar, "oc22/1.extxyz", extxyz_bytes(slabs(3)[::-1]))
    return path


def write_aselmdb(folder: Path, frames: list[tuple[Atoms, dict[str, Any]]]) -> Path:
    folder.mkdir()
    half = len(frames) // 2
    for name, part in (("data0000.aselmdb", frames[:half]), ("data0001.aselmdb", frames[half:])):
        with ase.db.connect(str(folder / name), type="aselmdb") as database:
            for atoms, data in part:
                database.write(atoms, data=data)
    return folder


def write_nabla2dft(folder: Path) -> Path:
    path = folder / "train_2k_energy.db"
    with ase.db.connect(str(path)) as database:
        for number, atoms in enumerate([*waters(), Atoms("Br")]):
            data = {"energy": np.array([energy_of(number)]), "forces": forces_of(len(atoms), number)}
            if number == 5:
                data["forces"] = data["forces"][:2]
            database.write(atoms, data=data, moses_id=number // 3, conformation_id=number)
    return path


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


def check_qcml(anion: Structure) -> None:
    assert (anion.charge, anion.multiplicity) == (-1, 2) and anion.energy == energy_of(4) * units.Hartree
    np.testing.assert_allclose(anion.positions, waters()[4].positions, atol=1e-6)
    np.testing.assert_allclose(anion.forces, forces_of(3, 4) * units.Hartree / units.Bohr, rtol=1e-6)


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
