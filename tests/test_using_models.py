"""Exported models in use: reload, chosen heads, precision, ASE calculator, predictions, screening."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from click.testing import CliRunner
from sources import make_shards, molecules, write_extxyz
from structures import facts, rattled_crystal, rattled_molecule, small_model

from hydrazero.models import Potential, load_model, save_model
from hydrazero.models.model_file import with_tasks
from hydrazero.shards.errors import ModelFileError, StructureError
from hydrazero.trainer.cli import main


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_model(small_model(dtype=torch.float32), out)
    return out


def test_a_loaded_model_predicts_the_same(path):
    atoms = [rattled_molecule(), rattled_crystal()]
    ours, theirs = Potential(small_model(dtype=torch.float32)), load_model(path)
    for a, b in zip(ours.predict(atoms), theirs.predict(atoms), strict=True):
        assert a["energy"] == b["energy"] and np.array_equal(a["forces"], b["forces"])


def test_size_and_content(path):
    weights = sum(p.numel() for p in small_model().parameters()) * 4
    assert path.stat().st_size < weights + 4096
    header = path.read_bytes()[:200]
    assert b"hydrazero-model" in path.read_bytes()[:4096] and b"pickle" not in header


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.3)])
def test_precisions(tmp_path, dtype, tolerance):
    model = small_model()
    atoms = [rattled_molecule()]
    save_model(model, tmp_path / "m.safetensors", dtype=dtype)
    exact, got = Potential(model).predict(atoms)[0], load_model(tmp_path / "m.safetensors").predict(atoms)[0]
    np.testing.assert_allclose(got["forces"], exact["forces"], atol=tolerance * np.abs(exact["forces"]).max())
    if dtype == "bfloat16":
        assert not np.array_equal(got["forces"], exact["forces"])


def test_chosen_heads_only(path, tmp_path):
    whole = load_model(path)
    save_model(with_tasks(whole.model, ["task1"]), tmp_path / "one.safetensors")
    one = load_model(tmp_path / "one.safetensors")
    assert one.tasks == ["task1"] and (tmp_path / "one.safetensors").stat().st_size < path.stat().st_size
    atoms = [rattled_molecule()]
    assert one.predict(atoms)[0]["energy"] == pytest.approx(
        whole.predict(atoms, tasks=["task1"])[0]["energy"], abs=1e-6
    )
    with pytest.raises(ModelFileError, match="did you mean 'task1'"):
        with_tasks(whole.model, ["task_1"])


def test_a_file_that_would_not_reproduce_the_model_is_refused(tmp_path, monkeypatch):
    import safetensors.torch

    from hydrazero.models import model_file

    write = safetensors.torch.save_file

    def damaged(weights, *args, **kwargs):
        write({name: value * 1.001 for name, value in weights.items()}, *args, **kwargs)

    monkeypatch.setattr(model_file.safetensors.torch, "save_file", damaged)
    with pytest.raises(ModelFileError, match="does not reproduce"):
        save_model(small_model(), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_rows_are_by_structure_then_task(path):
    potential = load_model(path)
    many = [molecule(name) for name in ("H2O", "CH4", "CO2")] * 40 + [rattled_crystal()]
    rows = potential.predict(many, tasks=["task1", "task0"])
    assert [(r["structure"], r["task"]) for r in rows] == [(n, t) for n in range(121) for t in ("task1", "task0")]
    alone = potential.predict([many[100]], tasks=["task0"])[0]
    assert rows[201]["energy"] == pytest.approx(alone["energy"], abs=1e-6)
    assert rows[-1]["stress"].shape == (3, 3) and rows[0]["stress"] is None
    with pytest.raises(StructureError, match=r"structure 1 holds Au, which task 'task0'"):
        potential.predict([molecule("H2O"), Atoms("Au")], tasks=["task0"])


def test_ase_calculator_relaxes_a_crystal_and_a_molecule(tmp_path):
    potential = Potential(small_model())
    atoms = rattled_crystal()
    atoms.calc = potential.calculator(task="task1")
    row = potential.predict([atoms], tasks=["task1"])[0]
    assert atoms.get_potential_energy() == row["energy"] == atoms.get_potential_energy(force_consistent=True)
    np.testing.assert_array_equal(atoms.get_forces(), row["forces"])
    np.testing.assert_allclose(atoms.get_stress(voigt=False), row["stress"], atol=1e-12)
    before = atoms.get_potential_energy()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-5, steps=10)
    assert atoms.get_potential_energy() < before
    water = rattled_molecule("H2O")
    water.calc = potential.calculator(task="task0")
    with pytest.raises(PropertyNotImplementedError):
        water.get_stress()
    with pytest.raises(ModelFileError, match="no task 'nothing'"):
        potential.calculator(task="nothing")


def test_neither_deepspeed_nor_webdataset_is_imported(path):
    code = (
        f"import sys; from hydrazero.models import load_model; p = load_model({str(path)!r}); "
        "from ase.build import molecule; a = molecule('H2O'); a.calc = p.calculator(task='task0'); a.get_forces(); "
        "bad = {'deepspeed', 'webdataset', 'tensorboard', 'mpi4py', 'click'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def screen(*arguments: object):
    result = CliRunner().invoke(main, ["screen", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_screen(tmp_path):
    model = small_model(dtype=torch.float32)
    model.tasks[1] = facts("task1", scale=2.0, elements=["H", "O"])
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    frames = [rattled_molecule(name, seed) for seed in range(60) for name in ("H2O", "CH4")]
    source = write_extxyz(tmp_path / "s.extxyz", frames)
    screen(path, source, "--out", tmp_path / "all.parquet", "--forces")
    rows = sorted(pq.read_table(tmp_path / "all.parquet").to_pylist(), key=lambda row: row["index"])
    assert [row["source_id"] for row in rows] == [f"s.extxyz#{n}" for n in range(120)]
    potential = load_model(path)
    expected = potential.predict(frames, tasks=["task0"])
    for row, want in zip(rows, expected, strict=True):
        assert row["energy_task0"] == pytest.approx(want["energy"], abs=1e-5)
        np.testing.assert_allclose(np.reshape(row["forces_task0"], (-1, 3)), want["forces"], atol=1e-4)
        assert (row["energy_task1"] is None) == ("C" in row["formula"])  # task1 has not seen carbon
    screen(path, source, "--out", tmp_path / "top.parquet", "--tasks", "task0", "--top", 7)
    top = pq.read_table(tmp_path / "top.parquet").to_pylist()
    ranked = sorted(rows, key=lambda row: row["interaction_per_atom_task0"])[:7]
    assert [row["index"] for row in top] == [row["index"] for row in ranked]


def test_screen_of_shards(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(with_known_nitrogen(), path)
    folder = make_shards(tmp_path, "emt", molecules(40))
    screen(path, folder, "--out", tmp_path / "s.parquet")
    assert pq.read_table(tmp_path / "s.parquet").num_rows == 40


def with_known_nitrogen():
    model = small_model(dtype=torch.float32)
    model.tasks = [facts(t.name, scale=t.scale, elements=["C", "H", "N", "O"]) for t in model.tasks]
    return model


def test_one_atom_cells_and_large_cells_together():
    potential = Potential(small_model())
    cells = [bulk("Na", cubic=False), bulk("NaCl", "rocksalt", a=5.6) * (3, 3, 3)]
    together = potential.predict(cells, tasks=["task0"])
    for cell, row in zip(cells, together, strict=True):
        assert row["energy"] == pytest.approx(potential.predict([cell], tasks=["task0"])[0]["energy"], abs=1e-9)
