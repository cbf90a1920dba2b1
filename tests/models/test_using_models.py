"""Use of exported models: loading, selected heads, precision, the ASE calculator and predictions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from click.testing import CliRunner
from placed import make_split_shards
from sources import labelled, molecules, write_extxyz
from structures import facts, rattled_crystal, rattled_molecule, small_model

from hydrazero.launch.cli.main import main
from hydrazero.models import Potential, load_model, save_model
from hydrazero.models.inference.model_file import with_tasks
from hydrazero.models.inference.potential import DEFAULT_SHAPE
from hydrazero.shards.errors import ModelFileError, StructureError


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


def test_chosen_heads_keep_every_digit():
    whole = small_model(dtype=torch.float64)
    chosen = with_tasks(whole, ["task1", "task0"])
    assert chosen.dtype == torch.float64
    for name, value in whole.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(chosen.state_dict()[name], value), name
    atoms = [rattled_molecule()]
    for task in ("task0", "task1"):
        ours, theirs = (Potential(model).predict(atoms, tasks=[task])[0]["forces"] for model in (whole, chosen))
        np.testing.assert_allclose(theirs, ours, rtol=1e-11)


def test_a_file_that_would_not_reproduce_the_model_is_refused(tmp_path, monkeypatch):
    import safetensors.torch

    from hydrazero.models.inference import model_file

    write = safetensors.torch.save_file

    def damaged(weights, *args, **kwargs):
        write({name: value * 1.001 for name, value in weights.items()}, *args, **kwargs)

    monkeypatch.setattr(model_file.safetensors.torch, "save_file", damaged)
    with pytest.raises(ModelFileError, match="does not reproduce"):
        save_model(small_model(), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_has_changed_is_noticed_and_others_may_read_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(small_model(), path)
    os.umask(mask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="is damaged: its weights are not those that were written"):
        load_model(path)


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
    assert atoms.get_potential_energy() == atoms.get_potential_energy(force_consistent=True)
    assert atoms.get_potential_energy() == pytest.approx(row["energy"], abs=1e-9)
    np.testing.assert_allclose(atoms.get_forces(), row["forces"], atol=1e-10)
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


def succeeded(*arguments: object):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result


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


def evaluation(model: Path) -> dict[str, Any]:
    return json.loads(model.with_name(f"{model.stem}.evaluation.json").read_text())["tasks"]


def test_structures_larger_than_a_batch(path, tmp_path):
    large = bulk("NaCl", "rocksalt", a=5.6, cubic=True) * (6, 6, 8)
    assert len(large) > DEFAULT_SHAPE.atoms
    frames = [rattled_crystal(1), large, rattled_crystal(2)]
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)))
    source = write_extxyz(tmp_path / "s.extxyz", frames)
    succeeded("screen", path, source, "--out", tmp_path / "s.parquet")
    rows = {row["atoms"]: row for row in pq.read_table(tmp_path / "s.parquet").to_pylist()}
    expected = load_model(path).predict([large], tasks=["task0"])[0]["energy"]
    assert rows[len(large)]["energy_task0"] == pytest.approx(expected, abs=1e-2) and len(rows) == 2
    folder = make_split_shards(tmp_path, "task0", train=frames[:1], test=frames[1:])
    succeeded("evaluate", path, folder)
    assert evaluation(path)["task0"]["structures"] == 2


def test_unseen_elements_are_counted_but_not_evaluated(path, tmp_path):
    ammonia = [labelled(rattled_molecule("NH3", seed)) for seed in range(3)]
    methane = [labelled(rattled_molecule("CH4", seed)) for seed in range(5)]
    train = [labelled(rattled_molecule("H2O"))]
    succeeded("evaluate", path, make_split_shards(tmp_path / "a", "task0", train=train, test=methane))
    without = evaluation(path)["task0"]
    result = succeeded(
        "evaluate", path, make_split_shards(tmp_path / "b", "task0", train=train, test=methane + ammonia)
    )
    row = evaluation(path)["task0"]
    assert (without.pop("unseen"), row.pop("unseen")) == (0, 3) and row.keys() == without.keys()
    for key, value in row.items():
        assert value == (pytest.approx(without[key]) if isinstance(value, float) else without[key])
    assert "task0: 3 structures left out" in result.output
    assert pq.read_table(path.with_name(f"{path.stem}.predictions") / "task0.parquet").num_rows == 5
    succeeded("evaluate", path, make_split_shards(tmp_path / "c", "task0", train=train, test=ammonia))
    row = evaluation(path)["task0"]
    assert row["unseen"] == 3 and row["structures"] == 0 and row["energy_mae_mev_per_atom"] is None


def test_an_evaluation_on_another_task_names_the_folder(path, tmp_path):
    water, methane = [labelled(rattled_molecule("H2O"))], [labelled(rattled_molecule("CH4"))]
    folder = make_split_shards(tmp_path / "a", "other", train=water, test=methane)
    done = CliRunner().invoke(main, ["evaluate", str(path), str(folder)])
    assert done.exit_code == 1 and f"{folder} holds the task 'other', which is not among those" in done.stderr
    assert "task0" in done.stderr and "fine-tune" in done.stderr


def test_an_evaluation_that_cannot_be_written_is_not_measured(path, tmp_path):
    water, methane = [labelled(rattled_molecule("H2O"))], [labelled(rattled_molecule("CH4"))]
    folder = make_split_shards(tmp_path / "a", "task0", train=water, test=methane)
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["evaluate", str(path), str(folder), "--out", str(tmp_path / "file" / "e")])
    assert done.exit_code == 1 and "file is no folder; name another with --out." in done.stderr, done.stderr


def test_evaluating_a_model_leaves_the_run_around_it_alone(path, tmp_path):
    model = tmp_path / "model.safetensors"
    model.write_bytes(path.read_bytes())
    (tmp_path / "evaluation.json").write_text("the run's")
    frames = {"train": molecules(1), "test": [labelled(rattled_molecule("H2O"))]}
    folder = make_split_shards(tmp_path / "shards", "task0", **frames)
    succeeded("evaluate", model, folder)
    assert (tmp_path / "evaluation.json").read_text() == "the run's" and not (tmp_path / "predictions").exists()
    assert evaluation(model)["task0"]["structures"] == 1
    assert [file.name for file in (tmp_path / "model.predictions").iterdir()] == ["task0.parquet"]
    succeeded("evaluate", model, folder, "--out", tmp_path / "e")
    assert sorted(file.name for file in (tmp_path / "e").iterdir()) == ["evaluation.json", "predictions"]


def test_tasks_without_test_structures_are_left_out_of_an_evaluation(path, tmp_path):
    there = make_split_shards(tmp_path / "a", "task0", train=molecules(1), test=[labelled(rattled_molecule("H2O"))])
    empty = make_split_shards(tmp_path / "b", "task1", train=molecules(1))
    model = tmp_path / "model.safetensors"
    model.write_bytes(path.read_bytes())
    said = succeeded("evaluate", model, there, empty).stderr
    assert f"warning: {empty} has no structures in the split 'test' and is left out." in said
    assert list(evaluation(model)) == ["task0"]
    refused = CliRunner().invoke(main, ["evaluate", str(model), str(empty)])
    assert refused.exit_code == 1 and f"{empty} has no structures in the split 'test'" in refused.output
