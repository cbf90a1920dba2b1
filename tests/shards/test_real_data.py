"""The sixteen real tasks, where their data is at hand: counts, duplicates, energies to the last digit.

Set HYDRAZERO_DATA to their folder (default: ../shared/data beside the repository).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest
from ase.units import Bohr, Hartree, kcal, mol
from click.testing import CliRunner
from results.sixteen import convert_task, expected_tasks, main
from test_convert import all_structures

from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.convert.workers import one_worker
from hydrazero.shards.errors import SourceError
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.readers import expand_sources, read_frames
from hydrazero.shards.structure import Structure

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("HYDRAZERO_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}: set HYDRAZERO_DATA"),
]

Energies = Iterator[tuple[str, float]]
"""Source id and energy in eV, read without our readers."""


def wbe() -> Energies:
    with h5py.File(DATA / "wbe_fitsnap" / "wbe.h5") as file:
        yield from ((f"wbe.h5#{number}", float(energy)) for number, energy in enumerate(file["energy"][:]))


def comment_lines(folder: str, pattern: str, factor: float, *names: str) -> Energies:
    for path in sorted((DATA / folder).glob("*xyz")):
        if path.name not in names and names:
            continue
        lines = path.read_text().splitlines()
        place = number = 0
        while place < len(lines):
            found = re.search(rf"(?:^|\s){pattern}=(\S+)", lines[place + 1])
            assert found is not None
            yield f"{path.name}#{number}", float(found.group(1)) * factor
            place, number = place + int(lines[place]) + 2, number + 1


def json_files(folder: str, energy: Callable[[dict], float], *, named: str) -> Energies:
    for path in sorted((DATA / folder).rglob("*.json")):
        name = path.name if named == "file" else f"{path.parent.name}/{path.name}"
        yield from ((f"{name}#{n}", energy(entry)) for n, entry in enumerate(json.loads(path.read_text())))


def ethanol_ccsdt() -> Energies:
    (path,) = DATA.glob("ethanol_multifid/ccsdt_ccpvtz/*.npz")
    with np.load(path) as archive:
        energies = archive["E"].reshape(-1) * (kcal / mol)
    yield from ((f"{path.name}#{number}", float(energy)) for number, energy in enumerate(energies))


def bo2(functional: str) -> Energies:
    with sqlite3.connect(DATA / "bo2_oxides" / "bo2_eos_4xc.db") as database:
        rows = database.execute("select id, energy, key_value_pairs from systems").fetchall()
    yield from ((f"bo2_eos_4xc.db#{row}", e) for row, e, pairs in rows if json.loads(pairs)["xc"] == functional)


def lips() -> Energies:
    path = str(DATA / "lips_lmdb" / "data.lmdb")
    with lmdb.open(path, subdir=False, readonly=True, lock=False) as environment, environment.begin() as transaction:
        for key, value in transaction.cursor():
            yield f"data.lmdb#{key.decode()}", float(pickle.loads(value)["energy"])


def water_pbe0ts() -> Energies:
    for folder in sorted((DATA / "water" / "pbe0_ts_deepmd").glob("data_*")):
        energies = [energy for path in sorted(folder.glob("set.*/energy.npy")) for energy in np.load(path)]
        yield from ((f"{folder.name}#{number}", float(energy)) for number, energy in enumerate(energies))


def water_rpbed3() -> Energies:
    text = (DATA / "water" / "rpbe_d3_n2p2" / "input.data").read_text()
    for number, energy in enumerate(re.findall(r"^energy +(\S+)", text, flags=re.MULTILINE)):
        yield f"input.data#{number}", float(energy) * Hartree


SOURCES: dict[str, Callable[[], Energies]] = {
    "wbe": wbe,
    "qm7_pbe0": lambda: comment_lines("qm7_pbe0_dftb", "atomization_pbe0_kcalmol", kcal / mol),
    "qm7_dftb": lambda: comment_lines("qm7_pbe0_dftb", "atomization_dftb_kcalmol", kcal / mol),
    "nbmotaw": lambda: json_files("nbmotaw_snap", lambda entry: entry["outputs"]["energy"], named="file"),
    "mlearn_pymatgen": lambda: json_files(
        "mlearn/pymatgen_json", lambda entry: entry["outputs"]["energy"], named="folder"
    ),
    "mlearn_jarvis": lambda: json_files(
        "mlearn/jarvis_json", lambda entry: entry["total_energy"] * len(entry["atoms"]["elements"]), named="folder"
    ),
    "ethanol_pbe": lambda: comment_lines(
        "ethanol_multifid/pbe_def2svp", "energy", 1.0, "train.xyz", "train_eth_meth.xyz", "test_MD.xyz"
    ),
    "ethanol_ccsdt": ethanol_ccsdt,
    "3bpa": lambda: comment_lines("3bpa_wb97x", "energy", 1.0),
    "bo2_lda": lambda: bo2("LDA"),
    "bo2_pbe": lambda: bo2("PBE"),
    "bo2_pbesol": lambda: bo2("PBEsol"),
    "bo2_am05": lambda: bo2("AM05"),
    "lips": lips,
    "water_pbe0ts": water_pbe0ts,
    "water_rpbed3": water_rpbed3,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("sixteen")


def shards_of(name: str, out: Path) -> Path:
    with one_worker() as worker:
        convert_task(name, expected_tasks()[name], DATA, out, workers=worker, trust_pickle=True)
    return out / name


def test_there_are_sixteen():
    assert len(SOURCES) == 16 and list(expected_tasks()) == list(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_counts_and_every_digit_of_the_energies(name, out):
    folder, expected = shards_of(name, out), expected_tasks()[name]
    assert expected.faults(read_manifest(folder)) == []
    source = dict(SOURCES[name]())
    dropped = expected.duplicates if load_convert_settings(settings_path(name)).duplicates == "drop" else 0
    assert len(source) == expected.structures + dropped
    arrived = [structure for part in all_structures(folder).values() for structure in part]
    assert Counter(s.source_id for s in arrived).most_common(1)[0][1] == 1
    for structure in arrived:
        assert structure.energy == source[structure.source_id], structure.source_id


def settings_path(name: str) -> Path:
    return ROOT / "launch" / "convert" / f"{name}.toml"


def structures(name: str) -> Iterator[Structure]:
    settings = load_convert_settings(settings_path(name)).read_settings(trust_pickle=True)
    for source in expand_sources([DATA / source for source in expected_tasks()[name].sources], settings):
        for frame in read_frames(source, settings):
            if frame.structure is not None:
                yield frame.structure


def test_forces_and_geometries_in_other_units():
    first = next(structures("water_rpbed3"))
    assert first.positions[0, 0] == 3.735290838 * Bohr and first.cell[2, 2] == 24.623508 * Bohr
    assert first.forces[0, 2] == pytest.approx(-0.027992554 * Hartree / Bohr, rel=1e-14)
    with np.load(next(DATA.glob("ethanol_multifid/ccsdt_ccpvtz/*.npz"))) as archive:
        np.testing.assert_allclose(next(structures("ethanol_ccsdt")).forces, archive["F"][0] * (kcal / mol), rtol=1e-14)


def test_the_pressure_of_an_equation_of_state_is_its_slope():
    """Stresses in the wrong unit or of the wrong sign would not be dE/dV."""
    path = DATA / "bo2_oxides" / "bo2_eos_4xc.db"
    settings = load_convert_settings(settings_path("bo2_pbe")).read_settings()
    wanted = {"xc": "PBE", "oxide": "SnO2", "polymorph": "rutile"}
    frames = [f for f in read_frames(path, settings) if {key: f.info[key] for key in wanted} == wanted]
    volumes = np.array([np.linalg.det(frame.structure.cell) for frame in frames])
    energies = np.array([frame.structure.energy for frame in frames])
    stresses = np.array([np.trace(frame.structure.stress) / 3 for frame in frames])
    slope = np.polynomial.Polynomial.fit(volumes, energies, 5).deriv()
    np.testing.assert_allclose(stresses[1:-1], slope(volumes[1:-1]), rtol=0.05, atol=0.002)


def test_the_stresses_of_tungsten_and_beryllium_have_two_units_and_are_left_out():
    """Of rattled primitive cells of tungsten in bar, of the equations of state in kbar, by their own bulk moduli."""
    with h5py.File(DATA / "wbe_fitsnap" / "wbe.h5") as file:
        names, groups = list(file["group_names"][:]), file["group"][:]
        pressures = np.trace(file["stress"][:], axis1=1, axis2=2) / 3
        volumes = np.abs(np.linalg.det(file["cell"][:])) / np.diff(file["ptr"][:])

    def slope(group: bytes, smallest: float, largest: float) -> float:
        wanted = (groups == names.index(group)) & (volumes > smallest) & (volumes < largest)
        return -float(np.polyfit(np.log(volumes[wanted]), pressures[wanted], 1)[0])

    # The bulk modulus of tungsten is 310 GPa.
    assert slope(b"slice_sample", 15.0, 17.5) == pytest.approx(3.1e6, rel=0.2)  # bar
    assert slope(b"EOS_Data", 15.0, 17.5) == pytest.approx(3.1e3, rel=0.2)  # kbar
    assert all(structure.stress is None for structure in structures("wbe"))


def test_the_command_keeps_what_is_there_and_names_what_is_wrong(out, tmp_path, monkeypatch):
    few = {name: expected_tasks()[name] for name in ("water_rpbed3", "bo2_pbe")}
    monkeypatch.setattr("results.sixteen.expected_tasks", lambda: few)
    first = CliRunner().invoke(main, [str(DATA), str(tmp_path / "out")])
    assert first.exit_code == 0 and "not_selected 885" in first.output and "kept" not in first.output
    second = CliRunner().invoke(main, [str(DATA), str(tmp_path / "out")])
    assert second.exit_code == 0 and second.output.count("kept") == 2
    few["bo2_pbe"] = type(few["bo2_pbe"])(sources=few["bo2_pbe"].sources, structures=296)
    third = CliRunner().invoke(main, [str(DATA), str(tmp_path / "out")])
    assert third.exit_code == 1 and "has 295 structures instead of 296" in third.stderr
    assert "{'not_selected': 885} frames set aside instead of {}" in third.stderr
    fourth = CliRunner().invoke(main, [str(DATA), str(tmp_path / "other")])
    assert fourth.exit_code == 1 and "task 'bo2_pbe' has 295 structures instead of 296" in fourth.stderr


def test_pickles_are_not_loaded_unasked(tmp_path):
    with one_worker() as worker, pytest.raises(SourceError, match=r"use --trust-pickle"):
        convert_task("lips", expected_tasks()["lips"], DATA, tmp_path, workers=worker, trust_pickle=False)
