"""FitSNAP, aenet's XSF, COMP6, ANI-1 and AIMNet2: values and units by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase.units import Bohr, Hartree, bar
from click.testing import CliRunner
from format_files import frames, reasons, structures

from hydrazero.launch.cli.main import main
from hydrazero.shards.convert.settings import load_convert_settings
from hydrazero.shards.errors import SourceError
from hydrazero.shards.manifest import SPLITS
from hydrazero.shards.readers import ReadSettings, SourceUnits, find_sources, read_frames
from hydrazero.shards.stream.block_reader import BlockReader

CELL = [[4.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 6.0]]
POSITIONS = [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]
FORCES = [[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]]
STRESS = [[1000.0, 10.0, 0.0], [10.0, 2000.0, 0.0], [0.0, 0.0, 3000.0]]


def configuration(**changes: object) -> dict[str, object]:
    values = {"Positions": POSITIONS, "Lattice": CELL, "AtomTypes": ["Ta", "W"], "NumAtoms": 2, "Energy": -20.5}
    return {**values, "Forces": FORCES, "Stress": STRESS, **changes}


def fitsnap(path: Path, *data: object, comment: str = "# A comment\n", **styles: str) -> Path:
    usual = {
        "PositionsStyle": "angstrom",
        "AtomTypeStyle": "chemicalsymbol",
        "Label": "two atoms",
        "StressStyle": "bar",
        "LatticeStyle": "angstrom",
        "EnergyStyle": "electronvolt",
        "ForcesStyle": "electronvoltperangstrom",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(comment + json.dumps({"Dataset": {"Data": list(data), **usual, **styles}}))
    return path


@pytest.mark.parametrize("comment", ["# A comment\n", ""])
def test_fitsnap(tmp_path, comment):
    path = fitsnap(tmp_path / "AIMD" / "one.json", configuration(), comment=comment)
    (frame,) = frames(path, require=("energy", "forces", "stress"))
    found = frame.structure
    assert found.energy == -20.5 and found.numbers.tolist() == [73, 74] and found.pbc.all()
    np.testing.assert_array_equal(found.forces, FORCES)
    np.testing.assert_array_equal(found.cell, CELL)
    # LAMMPS's pressure is positive under compression, ASE's stress under tension.
    np.testing.assert_allclose(found.stress, -np.array(STRESS) * bar, rtol=1e-12)
    assert frame.info["group"] == "AIMD" and frame.info["Label"] == "two atoms" and frame.source_id == "one.json#0"


def test_units_of_fitsnap(tmp_path):
    styles = {"StressStyle": "kB", "EnergyStyle": "hartree", "ForcesStyle": "hartree_per_bohr"}
    path = fitsnap(tmp_path / "a.json", configuration(), **styles)
    (found,) = structures(path)
    assert found.energy == pytest.approx(-20.5 * Hartree)
    np.testing.assert_allclose(found.forces, np.array(FORCES) * Hartree / Bohr)
    np.testing.assert_allclose(found.stress, -1000 * np.array(STRESS) * bar)
    with pytest.raises(SourceError, match=r"units\.energy is 'eV', but the file states 'hartree' .*EnergyStyle"):
        frames(path, units=SourceUnits(energy="eV"))
    with pytest.raises(SourceError, match=r"'furlong' for the positions .* not known"):
        frames(fitsnap(tmp_path / "b.json", configuration(), PositionsStyle="furlong"))
    with pytest.raises(SourceError, match=r"states two units, 'angstrom' .* and 'bohr'"):
        frames(fitsnap(tmp_path / "c.json", configuration(), LatticeStyle="bohr"))


def test_faults_of_fitsnap(tmp_path):
    short = configuration(Forces=FORCES[:1])
    path = fitsnap(tmp_path / "a.json", configuration(), short, "words", configuration(AtomTypes=["Xx", "W"]))
    assert reasons(frames(path)) == ["", "forces_shape", "unreadable", "unknown_element"]
    for text in ('{"Dataset": 5}', '{"Dataset": {"Data": {}}}', "[1]", '{"Dataset": {"Data": [', "[" * 5000):
        path.write_text(text)
        with pytest.raises(SourceError, match=r"a\.json"):
            frames(path, "fitsnap")
    with pytest.raises(SourceError, match="'AtomTypeStyle' is 'number'"):
        frames(fitsnap(path, configuration(), AtomTypeStyle="number"))


def test_folders_of_fitsnap_are_found(tmp_path):
    one = fitsnap(tmp_path / "A15" / "1.json", configuration())
    two = fitsnap(tmp_path / "BCC" / "1.json", configuration())
    assert find_sources([tmp_path], ReadSettings()).files == (one, two)


CRYSTAL = """# total energy = {energy}

CRYSTAL
PRIMVEC
4.0 0.0 0.0
0.0 5.0 0.0
0.0 0.0 6.0
PRIMCOORD
2 1
Ta 0.0 0.0 0.0 0.1 0.2 0.3
W  2.0 2.0 2.0 -0.1 -0.2 -0.3
"""


def test_xsf_of_aenet(tmp_path):
    path = tmp_path / "a.xsf"
    path.write_text(CRYSTAL.format(energy="-20.5 eV"))
    (found,) = structures(path, require=("energy", "forces"))
    assert found.energy == -20.5 and found.numbers.tolist() == [73, 74] and found.pbc.all()
    np.testing.assert_allclose(found.forces, FORCES, rtol=1e-12)
    np.testing.assert_array_equal(found.cell, CELL)
    np.testing.assert_array_equal(found.positions, POSITIONS)
    path.write_text(CRYSTAL.format(energy="-20.5 Hartree"))
    (found,) = structures(path)
    assert found.energy == pytest.approx(-20.5 * Hartree)
    np.testing.assert_allclose(found.forces, np.array(FORCES) * Hartree, rtol=1e-12)
    path.write_text(CRYSTAL.format(energy="-2.05d1"))
    (found,) = structures(path)
    assert found.energy == -20.5
    np.testing.assert_allclose(found.forces, FORCES, rtol=1e-12)
    with pytest.raises(SourceError, match=r"units\.energy is 'Ry', but the file states 'eV'"):
        path.write_text(CRYSTAL.format(energy="-20.5 eV"))
        frames(path, units=SourceUnits(energy="Ry"))


def test_other_xsf(tmp_path):
    path = tmp_path / "a.xsf"
    path.write_text(CRYSTAL.format(energy="").replace("# total energy = \n", ""))
    (found,) = structures(path)
    assert found.energy is None
    np.testing.assert_allclose(found.forces, np.array(FORCES) * Hartree, rtol=1e-12)  # as the format demands
    path.write_text("# total energy = -5.5 eV\n\nATOMS\nO 0 0 0 0 0 1\nH 0 0 1 0 0 -1\n")
    (found,) = structures(path, require=("energy", "forces"))
    assert found.energy == -5.5 and not found.pbc.any() and found.forces.tolist() == [[0, 0, 1], [0, 0, -1]]
    path.write_text(CRYSTAL.format(energy="-1 eV").replace("CRYSTAL", "SLAB"))
    (found,) = structures(path)
    assert found.pbc.tolist() == [True, True, False] and found.cell.tolist() == CELL
    for text in ("CRYSTAL\nPRIMVEC\n1 2\n", "what\n", CRYSTAL[:-30], CRYSTAL.replace("Ta", "Xx"), "ATOMS\n"):
        path.write_text(text)
        with pytest.raises(SourceError, match=r"a\.xsf"):
            frames(path)


h5py = pytest.importorskip("h5py")
WATER = np.array([[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]])
COUNT = 12


def molecules(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return positions, energies and gradients of COUNT geometries."""
    random = np.random.default_rng(number)
    positions = WATER + 0.01 * random.standard_normal((COUNT, 3, 3))
    return positions, -76.0 - 0.01 * np.arange(COUNT), random.standard_normal((COUNT, 3, 3))


def write_comp6(path: Path, gradients: bool = True) -> Path:
    with h5py.File(path, "w") as file:
        for number in range(2):
            positions, energies, gradient = molecules(number)
            group = file.create_group(f"s66x8/mol{number:02d}")
            group["species"] = np.array(["O", "H", "H"], dtype="S1")
            group["coordinates"], group["energies"] = positions.astype(np.float32), energies
            group["lot"] = np.array(["wb97x/6-31g*"], dtype="S12")
            if gradients:
                group["forces"] = gradient.astype(np.float32)
    return path


def converted(source: Path, out: Path, *options: str) -> dict[str, object]:
    """Convert a source, and return all structures by their source ids."""
    result = CliRunner().invoke(main, ["convert", str(source), "--out", str(out), *options])
    assert result.exit_code == 0, result.stderr
    readers = [BlockReader(out, split) for split in SPLITS]
    blocks = [reader.read(number) for reader in readers for number in range(len(reader))]
    return {block.names[row]: block.structure(row) for block in blocks for row in range(len(block))}


def test_what_comp6_calls_forces_are_gradients(tmp_path):
    found = converted(write_comp6(tmp_path / "s66x8.h5"), tmp_path / "out", "--preset", "comp6")
    assert len(found) == 2 * COUNT
    frame = found["s66x8.h5#s66x8/mol01/3"]
    positions, energies, gradients = molecules(1)
    assert frame.numbers.tolist() == [8, 1, 1] and frame.energy == pytest.approx(energies[3] * Hartree, abs=1e-9)
    np.testing.assert_allclose(frame.forces, -gradients[3] * Hartree, rtol=1e-6)
    np.testing.assert_allclose(frame.positions, positions[3], rtol=1e-6)


def test_ani1_has_no_forces(tmp_path):
    found = converted(write_comp6(tmp_path / "a.h5", gradients=False), tmp_path / "out", "--preset", "ani1")
    frame = found["a.h5#s66x8/mol00/2"]
    assert frame.energy == pytest.approx(molecules(0)[1][2] * Hartree) and frame.forces is None


def write_aimnet2(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        for name, numbers in (("003", [8, 1, 1]), ("002", [17, 1])):
            positions, energies, forces = molecules(3)
            atoms = len(numbers)
            group = file.create_group(name)
            group["numbers"] = [numbers] * COUNT if name == "002" else [numbers, [1, 8, 1]] * (COUNT // 2)
            group["coord"], group["energy"], group["forces"] = positions[:, :atoms], energies, forces[:, :atoms]
            group["charge"] = [0.0, -1.0] * (COUNT // 2)
            group["charges"] = np.zeros((COUNT, atoms))
    return path


def test_aimnet2_is_grouped_by_size(tmp_path):
    found = converted(write_aimnet2(tmp_path / "a.h5"), tmp_path / "out", "--preset", "aimnet2")
    assert len(found) == 2 * COUNT
    _, energies, forces = molecules(3)
    frame = found["a.h5#003/1"]
    assert frame.numbers.tolist() == [1, 8, 1] and frame.charge == -1 and frame.energy == energies[1]
    np.testing.assert_allclose(frame.forces, forces[1], rtol=1e-6)
    assert found["a.h5#002/2"].numbers.tolist() == [17, 1] and found["a.h5#002/2"].charge == 0


@pytest.mark.parametrize("preset", ["comp6", "ani1", "aimnet2"])
def test_the_preset_is_named_where_none_is_given(tmp_path, preset):
    path = tmp_path / "a.h5"
    if preset == "aimnet2":
        write_aimnet2(path)
    else:
        write_comp6(path, gradients=preset == "comp6")
    with pytest.raises(SourceError, match=f"convert it with --preset {preset}, which knows units and signs"):
        frames(path)
    settings = load_convert_settings(None, preset=preset).read_settings()
    assert not any(frame.error for frame in read_frames(path, settings))
