"""Relaxations of a screen keep fixed atoms, vacuum, charge and spin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.constraints import FixAtoms, FixBondLength, FixCartesian, FixedLine, FixedPlane, FixScaled
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import FIRE
from click.testing import CliRunner
from structures import CUTOFF, facts, rattled_molecule, to_structure

from hydrazero.launch.cli.main import main
from hydrazero.models import Potential, save_model
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.screening import relaxation
from hydrazero.models.screening.constraints import freedom_of
from hydrazero.models.screening.relaxation import Relaxer
from hydrazero.shards.readers.parts.fixed_atoms import fixed_in

pytest.importorskip("torch_sim")


def model_of(**settings: object) -> AtomisticModel:
    """Return a model whose nuclei repel, so that surfaces and cells relax by much."""
    torch.manual_seed(1)
    encoder = EncoderSettings(encoder="painn", features=16, layers=1, radial_functions=8, cutoff=CUTOFF)
    task = facts("m", elements=["Cu", "H", "O"], reference_energies={"Cu": -3.0, "H": -1.0, "O": -2.0}, **settings)
    return AtomisticModel(ModelSettings(encoder=encoder, head_features=8, repulsion="zbl"), [task]).double().eval()


def slab(amplitude: float = 0.15) -> Atoms:
    atoms = fcc111("Cu", (2, 2, 3), a=3.3, vacuum=6.0)
    atoms.rattle(amplitude, seed=0)
    atoms.pbc = True
    return atoms


def screened(folder: Path, sources: list[Path], *options: object, **settings: object) -> list[dict]:
    if not (folder / "m.safetensors").exists():
        save_model(model_of(**settings), folder / "m.safetensors", dtype="float64")
    out = folder / f"{len(list(folder.iterdir()))}.parquet"
    given = ["screen", folder / "m.safetensors", *sources, "--out", out, "--relax", 60, *options]
    done = CliRunner().invoke(main, list(map(str, given)))
    assert done.exit_code == 0, done.output
    return pq.read_table(out).to_pylist()


def moved(row: dict, atoms: Atoms) -> np.ndarray:
    return np.abs(np.reshape(row["positions"], (-1, 3)) - atoms.positions)


def test_fixed_atoms_stay_in_whatever_format_fixes_them(tmp_path):
    low = slab()
    fixed = low.positions[:, 2] < low.positions[:, 2].mean() - 1.0
    low.set_constraint(FixAtoms(mask=fixed))
    flat = slab()
    flat.set_constraint([FixCartesian(n, mask=(False, False, True)) for n in range(len(flat))])
    molecule = rattled_molecule("H2O", 1)
    molecule.set_constraint(FixAtoms([0]))
    write(tmp_path / "a.extxyz", low)
    write(tmp_path / "b.extxyz", flat)
    write(tmp_path / "c.traj", [low, molecule])
    write(tmp_path / "POSCAR", low, format="vasp", direct=False)
    rows = screened(tmp_path, [tmp_path / name for name in ("a.extxyz", "b.extxyz", "c.traj")])
    rows += screened(tmp_path, [tmp_path / "POSCAR"], "--format", "ase")
    assert 4 <= fixed.sum() < len(low) and {row["reason"] for row in rows} == {None}
    order = np.argsort(low.get_chemical_symbols(), kind="stable")
    for row in (rows[0], rows[2], rows[4]):
        assert moved(row, low[order])[fixed].max() < 1e-7 and moved(row, low[order])[~fixed].max() > 0.02
        np.testing.assert_allclose(np.reshape(row["cell"], (3, 3)), low.cell[:], atol=1e-7)
    assert moved(rows[1], flat)[:, 2].max() < 1e-7 and moved(rows[1], flat)[:, :2].max() > 0.02
    assert moved(rows[3], molecule)[0].max() < 1e-7 and moved(rows[3], molecule)[1:].max() > 0.01


def test_files_without_ase_fix_atoms_too(tmp_path):
    atoms = slab()
    fixed = atoms.positions[:, 2] < atoms.positions[:, 2].mean() - 1.0
    sites = [
        {"species": [{"element": "Cu", "occu": 1}], "abc": abc, "properties": {"selective_dynamics": [free] * 3}}
        for abc, free in zip(atoms.get_scaled_positions().tolist(), (~fixed).tolist(), strict=True)
    ]
    entry = {"structure": {"lattice": {"matrix": atoms.cell.tolist()}, "sites": sites}}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    columns = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell[:], "fixed": 1 * fixed}
    pq.write_table(pa.table({name: [values.tolist()] for name, values in columns.items()}), tmp_path / "a.parquet")
    rows = screened(tmp_path, [tmp_path / "a.json"], "--format", "pymatgen")
    rows += screened(tmp_path, [tmp_path / "a.parquet"])
    for row in rows:
        assert row["reason"] is None and moved(row, atoms)[fixed].max() < 1e-7 < 0.02 < moved(row, atoms)[~fixed].max()


def test_flags_of_atoms_are_read_in_all_forms_and_nothing_else_is():
    def fixed(value: object, name: str = "fixed", atoms: int = 2) -> list[list[int]]:
        return [constraint.get_indices().tolist() for constraint in fixed_in({name: value}, atoms)]

    assert fixed([1, 0]) == fixed([[True], [False]]) == fixed(["T", "F"]) == fixed([0, 1], "move_mask") == [[0]]
    assert fixed([[1, 1, 1], [0, 1, 0]], "move_mask") == [[1]]  # along x and z
    for other in (True, "none", [1, 0, 1], [[1, 0]], [], None, {"a": 1}):
        assert fixed(other) == []
    assert fixed([], atoms=0) == []


def test_atoms_move_along_the_directions_that_are_left():
    skew = Atoms("Cu3", [[0, 0, 0], [1, 1, 1], [2, 2, 2]], cell=[[4, 0, 0], [1, 4, 0], [0, 1, 5]], pbc=True)
    along = np.array([1.0, 2.0, 2.0]) / 3.0
    skew.set_constraint([FixedLine(0, along), FixedPlane(1, along), FixScaled(2, (True, False, False))])
    free = freedom_of(to_structure(skew, constraints=tuple(skew.constraints)), CUTOFF)
    np.testing.assert_allclose(free.atoms[0], np.outer(along, along), atol=1e-12)
    np.testing.assert_allclose(free.atoms[1], np.eye(3) - np.outer(along, along), atol=1e-12)
    normal = np.cross(skew.cell[1], skew.cell[2])
    np.testing.assert_allclose(free.atoms[2] @ normal, 0.0, atol=1e-12)
    np.testing.assert_allclose(free.atoms[2] @ skew.cell[1], skew.cell[1], atol=1e-12)
    both = (FixedPlane([0, 1], along), FixCartesian(1, mask=(True, False, False)))
    crossed = freedom_of(to_structure(skew, constraints=both), CUTOFF).atoms[1]
    line = np.array([0.0, 1.0, -1.0]) / np.sqrt(2.0)  # what is orthogonal to x and to the normal of the plane
    np.testing.assert_allclose(crossed, np.outer(line, line), atol=1e-12)
    assert not free.strain.any()


def test_constraints_that_are_not_kept_are_a_reason(tmp_path):
    stiff = rattled_molecule("H2O")
    stiff.set_constraint(FixBondLength(0, 1))
    write(tmp_path / "a.traj", [stiff, rattled_molecule("H2O")])
    rows = screened(tmp_path, [tmp_path / "a.traj"])
    assert rows[0]["reason"] == "it has a constraint of the type FixBondLengths, which --relax does not keep"
    assert rows[0]["energy_m"] is None and rows[1]["reason"] is None


def test_vacuum_stays_while_the_rest_of_the_cell_relaxes(tmp_path):
    crystal = bulk("Cu", cubic=True, a=3.3)
    crystal.rattle(0.05, seed=0)
    open_slab = slab()
    open_slab.pbc = (True, True, False)
    wire = Atoms("Cu2", [[7, 7, 0.1], [7.2, 7, 2.0]], cell=[14, 14, 3.9], pbc=True)
    box = rattled_molecule("H2O")
    box.set_cell([15, 15, 15])
    box.pbc = True
    frames = [crystal, slab(), open_slab, wire, box]
    write(tmp_path / "a.extxyz", frames)
    rows = screened(tmp_path, [tmp_path / "a.extxyz"])
    assert {row["reason"] for row in rows} == {None}
    strained = []
    for row, atoms in zip(rows, frames, strict=True):
        lengths = np.linalg.norm(np.reshape(row["cell"], (3, 3)), axis=1)
        strained.append((np.abs(lengths - atoms.cell.lengths()) > 1e-6).tolist())
    assert strained == [[True] * 3, [True, True, False], [True, True, False], [False, False, True], [False] * 3]
    cells = [np.reshape(row["cell"], (3, 3)) for row in rows]
    np.testing.assert_allclose(cells[1], cells[2], atol=1e-6)  # however the slab's vacuum is written
    np.testing.assert_allclose(cells[2][2], open_slab.cell[2], atol=1e-9)
    assert rows[1]["energy_m"] == pytest.approx(rows[2]["energy_m"], abs=1e-6)


def test_a_slab_relaxes_to_what_ase_gives_with_a_mask(monkeypatch):
    monkeypatch.setattr(relaxation, "FORCE_LIMIT", 0.005)
    potential = Potential(model_of())
    atoms = slab(0.02)
    (found,) = Relaxer(potential, ["m"], 600, 100).relaxed([to_structure(atoms)])
    atoms.calc = potential.calculator("m")
    FIRE(FrechetCellFilter(atoms, mask=(1, 1, 0, 0, 0, 1)), logfile=None).run(fmax=0.005, steps=600)
    energy = potential.predict(Atoms(found.numbers, found.positions, cell=found.cell, pbc=True))[0]["energy"]
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=0.02)
    assert np.linalg.det(found.cell) == pytest.approx(atoms.get_volume(), rel=0.06)  # it is soft


def test_a_relaxation_knows_charge_and_spin():
    potential = Potential(model_of(charge_spin=True, multiplicity_known=True))
    water = rattled_molecule("H2O", 1)
    states = [(0, 1), (1, 2), (0, 1), (-1, 2)]
    given = [to_structure(water, charge=charge, multiplicity=spin) for charge, spin in states]
    found = Relaxer(potential, ["m"], 40, 100).relaxed(given)
    for structure, (charge, spin) in zip(found, states, strict=True):
        assert (structure.charge, structure.multiplicity) == (charge, spin)
        alone = Relaxer(potential, ["m"], 40, 100).relaxed([to_structure(water, charge=charge, multiplicity=spin)])[0]
        np.testing.assert_allclose(structure.positions, alone.positions, atol=1e-9)
    np.testing.assert_allclose(found[0].positions, found[2].positions, atol=1e-9)
    assert np.abs(found[0].positions - found[1].positions).max() > 1e-4
