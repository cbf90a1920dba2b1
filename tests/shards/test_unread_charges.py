"""A charge, a spin or a stress under a name that is not read is never lost without a word."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from ase.build import bulk, molecule
from sources import labelled

from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.manifest import Manifest

CHARGE = "the field '{}' looks like the total charge ({}), but is not read"


def waters(name: str, values: list[object]) -> list:
    frames = []
    for number, value in enumerate(values):
        atoms = molecule("H2O")
        atoms.rattle(0.05, seed=number)
        atoms = labelled(atoms)
        atoms.info[name] = value
        frames.append(atoms)
    return frames


def converted(path: Path, frames: list, **settings: object) -> Manifest:
    ase.io.write(path, frames)
    return convert([path], "t", path.parent / f"{len(list(path.parent.iterdir()))}", ConvertSettings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["extxyz", "traj"])
@pytest.mark.parametrize("name", ["total_charge", "Charge", "REF_charge", "net_charge"])
def test_a_charge_under_another_name_is_said_and_can_be_read(tmp_path, name, suffix):
    frames = waters(name, [1, 0, -1, 1] * 5)
    manifest = converted(tmp_path / f"a.{suffix}", frames)
    (warning,) = [text for text in manifest.warnings if "total charge" in text]
    assert warning.startswith(CHARGE.format(name, "-1 in 5, 0 in 5, 1 in 10 frames"))
    assert f'[fields] charge = "{name}" reads it' in warning and manifest.charged_structures == 0
    read = converted(tmp_path / f"a.{suffix}", frames, fields={"charge": name})
    assert read.charged_structures == 15 and not [text for text in read.warnings if "charge" in text]
    assert not [
        text for text in converted(tmp_path / f"a.{suffix}", frames, fields={"charge": ""}).warnings if "charge" in text
    ]


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("total_charge", [0, 0.0], False),
        ("total_charge", ["+1", 0], True),
        ("spin", [0, 0], False),
        ("spin", [1, 1], False),
        ("spin", [0, 1], True),
        ("spin", [2, 1], True),
        ("spin", [0.5, 0.5], True),
        ("spin_multiplicity", [3, 3], True),
        ("charges", [1, 1], False),
    ],
)
def test_neutral_structures_and_singlets_lose_nothing(tmp_path, name, values, said):
    manifest = converted(tmp_path / "a.extxyz", waters(name, values * 10))
    found = [text for text in manifest.warnings if "is not read" in text]
    assert len(found) == said and all(f"'{name}'" in text for text in found)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("chrage", 1, "charge"),
        ("Chareg", -1, "charge"),
        ("chage", 2, "charge"),
        ("multiplcity", 3, "spin"),
        ("mulitplicity", 2, "spin"),
        ("change", 1, None),  # a word of its own
        ("chrage", 0.37, None),
        ("chrage", "high", None),
        ("coverage", 1, None),
    ],
)
def test_a_misspelt_charge_is_said(tmp_path, name, value, kind):
    manifest = converted(tmp_path / "a.extxyz", waters(name, [value] * 10))
    found = [text for text in manifest.warnings if "is not read" in text or "but is not read" in text]
    assert len(found) == (kind is not None) and all(f"the field '{name}' looks like the" in text for text in found)
    assert kind is None or kind in found[0]


@pytest.mark.parametrize("charge", [0, np.nan])
def test_a_charge_that_is_zero_or_unknown_beside_another(tmp_path, charge):
    frames = waters("charge", [charge] * 10)
    for number, atoms in enumerate(frames):
        atoms.info["total_charge"] = number % 2
    (warning,) = [text for text in converted(tmp_path / "a.extxyz", frames).warnings if "is not read" in text]
    assert warning.startswith(CHARGE.format("total_charge", "0 in 5, 1 in 5 frames"))


def test_charges_of_atoms_that_add_up_to_a_total_charge_are_said(tmp_path):
    frames = []
    for seed in range(20):
        atoms = molecule("H2O")
        atoms.rattle(0.05, seed=seed)
        atoms.set_initial_charges([0.4, 0.3, 0.3])
        frames.append(labelled(atoms))
    (warning,) = [text for text in converted(tmp_path / "a.traj", frames).warnings if "charge" in text]
    assert warning.startswith(
        "the initial charges of atoms add up to a total charge (1 in 20 frames), which is not read"
    )


def test_other_formats_say_it_too(tmp_path):
    entries = [
        {
            "energy": -14.0 - 0.01 * n,
            "forces": [[0.0, 0.0, 0.0]] * 2,
            "info": {"total_charge": 1 + n % 2},
            "structure": {
                "sites": [
                    {"species": [{"element": "H", "occu": 1}], "xyz": [0, 0, 0]},
                    {"species": [{"element": "O", "occu": 1}], "xyz": [0, 0, 1 + 0.01 * n]},
                ]
            },
        }
        for n in range(20)
    ]
    (tmp_path / "a.json").write_text(json.dumps([{**entry, **entry.pop("info")} for entry in entries]))
    manifest = convert([tmp_path / "a.json"], "t", tmp_path / "out", ConvertSettings(format="pymatgen"))
    assert [
        text for text in manifest.warnings if text.startswith(CHARGE.format("total_charge", "1 in 10, 2 in 10 frames"))
    ]


@pytest.mark.parametrize("name", ["Charge", "spin"])
def test_arrays_of_archives_say_it_too(tmp_path, name):
    frames = waters("number", list(range(20)))
    positions = np.array([atoms.positions for atoms in frames])
    forces = np.array([atoms.get_forces() for atoms in frames])
    labels = {"energy": [atoms.get_potential_energy() for atoms in frames], name: [2, 1] * 10}
    values = {"z": frames[0].numbers, "R": positions, "E": labels["energy"], "F": forces, name: labels[name]}
    np.savez(tmp_path / "a.npz", **values)
    with h5py.File(tmp_path / "groups.h5", "w") as file:
        of_atoms = {"numbers": frames[0].numbers, "positions": positions, "forces": forces}
        for key, array in {**of_atoms, **labels}.items():
            file[f"H2O/{key}"] = array
    with h5py.File(tmp_path / "ragged.h5", "w") as file:
        of_atoms = {"numbers": np.tile(frames[0].numbers, 20), "positions": positions.reshape(-1, 3)}
        of_atoms |= {"forces": forces.reshape(-1, 3), "n_atoms": np.full(20, 3)}
        for key, array in {**of_atoms, **labels}.items():
            file[key] = array
    for path in sorted(tmp_path.iterdir()):
        settings = ConvertSettings(format="hdf5_groups" if path.stem == "groups" else None)
        found = [
            text for text in convert([path], "t", tmp_path / path.stem, settings).warnings if "is not read" in text
        ]
        assert len(found) == 1 and f"the field '{name}'" in found[0] and "(1 in 10, 2 in 10 frames)" in found[0], path


def test_a_charge_among_the_attributes_of_a_group_is_read(tmp_path):
    frames = waters("number", list(range(4)))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["H2O/numbers"], file["H2O/positions"] = frames[0].numbers, np.array([atoms.positions for atoms in frames])
        file["H2O/energy"] = [atoms.get_potential_energy() for atoms in frames]
        file["H2O/forces"] = np.array([atoms.get_forces() for atoms in frames])
        file["H2O"].attrs["total_charge"] = -1
    manifest = convert([tmp_path / "a.h5"], "t", tmp_path / "out", ConvertSettings(format="hdf5_groups"))
    assert manifest.charged_structures == 4


@pytest.mark.parametrize(("name", "charged"), [("charge", 2), ("total_charge", 0), ("total_spin", 0)])
def test_files_of_deepmd_systems(tmp_path, name, charged):
    (tmp_path / "sys" / "set.000").mkdir(parents=True)
    (tmp_path / "sys" / "type.raw").write_text("0\n0\n")
    (tmp_path / "sys" / "type_map.raw").write_text("H\n")
    (tmp_path / "sys" / "nopbc").write_text("")
    coordinates = np.array([[0, 0, 0, 0, 0, 0.7 + 0.01 * n] for n in range(4)])
    arrays = {
        "coord": coordinates,
        "energy": np.arange(-4.0, 0.0),
        "force": np.zeros((4, 6)),
        name: np.array([2, 0, 0, 2]),
    }
    for key, array in arrays.items():
        np.save(tmp_path / "sys" / "set.000" / f"{key}.npy", array)
    manifest = convert(
        [tmp_path / "sys"],
        "t",
        tmp_path / "out",
        ConvertSettings(format="deepmd", split={"train": 1, "val": 0, "test": 0}),
    )
    assert manifest.charged_structures == charged
    assert sum("is not read" in text for text in manifest.warnings) == (charged == 0)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("virial", "virial"),
        ("REF_virials", "virial"),
        ("virail", "virial"),
        ("Stress", "stress"),
        ("sterss", "stress"),
        ("srtess", "stress"),
    ],
)
def test_a_stress_under_another_name_is_said_and_can_be_read(tmp_path, name, label):
    frames = []
    for seed in range(8):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        atoms = labelled(atoms)
        atoms.info[name] = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        del atoms.calc.results["stress"]
        frames.append(atoms)
    manifest = converted(tmp_path / "a.extxyz", frames)
    (warning,) = [text for text in manifest.warnings if "is not read" in text]
    assert warning.startswith(f"8 structures have a field '{name}', which is not read, and no stress")
    assert f'[fields] {label} = "{name}" reads it' in warning and "stress" not in manifest.labels
    read = converted(tmp_path / "a.extxyz", frames, fields={label: name})
    assert "stress" in read.labels and not [text for text in read.warnings if "is not read" in text]
    assert not [
        text for text in converted(tmp_path / "a.extxyz", frames, fields={"stress": ""}).warnings if "stress" in text
    ]


@pytest.mark.parametrize("name", ["charge", "Charge", "cell"])
def test_empty_datasets_of_hdf5_are_no_values(tmp_path, name):
    frames = waters("number", list(range(4)))
    positions, forces = np.array([a.positions for a in frames]), np.array([a.get_forces() for a in frames])
    energies, numbers = [a.get_potential_energy() for a in frames], frames[0].numbers
    with h5py.File(tmp_path / "groups.h5", "w") as file:
        group = file.create_group("H2O")
        group["numbers"], group["positions"], group["energy"], group["forces"] = numbers, positions, energies, forces
        group[name] = h5py.Empty("f8")
        group.attrs["multiplicity"] = h5py.Empty("f8")
    with h5py.File(tmp_path / "ragged.h5", "w") as file:
        file["numbers"], file["n_atoms"], file["energy"] = np.tile(numbers, 4), np.full(4, 3), energies
        file["positions"], file["forces"] = positions.reshape(-1, 3), forces.reshape(-1, 3)
        file[name] = h5py.Empty("f8")
    for path in sorted(tmp_path.iterdir()):
        settings = ConvertSettings(format="hdf5_groups" if path.stem == "groups" else None)
        manifest = convert([path], "t", tmp_path / path.stem, settings)
        assert manifest.charged_structures == manifest.periodic_structures == 0
        assert not [text for text in manifest.warnings if "is not read" in text]
