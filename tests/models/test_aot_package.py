"""Packages compiled ahead of time: the graph agrees with the model for any sizes, and needs no code of this library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from structures import CUTOFF, facts, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.launch.cli.main import main
from hydrazero.models import Potential, save_model
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders import ENCODERS
from hydrazero.models.inference.aot_package import package_inputs, trace_model, write_package
from hydrazero.models.inference.model_file import with_tasks
from hydrazero.models.task_facts import TargetFacts
from hydrazero.shards.errors import ModelFileError

WITHOUT_US = """
import sys
sys.modules["hydrazero"] = None  # an import of it fails
import numpy as np, torch
from ase.io import read
from ase.neighborlist import neighbor_list

package = torch._inductor.aoti_load_package(sys.argv[1])
facts = package.get_metadata()
assert facts["inputs"] == "numbers positions first second shifts cell" and facts["task"] == "task1", facts
for n, atoms in enumerate(read(sys.argv[2], index=":")):
    i, j, S = neighbor_list("ijS", atoms, float(facts["cutoff"]))
    once = {}
    for a, b, s in zip(i.tolist(), j.tolist(), S.tolist()):
        if (b, a, tuple(-x for x in s)) not in once:
            once[a, b, tuple(s)] = None
    first, second = (np.array([key[end] for key in once], dtype=np.int64).reshape(-1) for end in (0, 1))
    shifts = np.array([key[2] for key in once], dtype=float).reshape(-1, 3) @ atoms.cell[:]
    number = getattr(torch, facts["dtype"])
    cell = torch.tensor(atoms.cell[:] * bool(atoms.pbc.any() and atoms.cell.rank == 3), dtype=number)
    energy, forces, stress = package(
        torch.tensor(atoms.numbers), torch.tensor(atoms.positions, dtype=number), torch.tensor(first),
        torch.tensor(second), torch.tensor(shifts, dtype=number), cell)
    np.savez(f"{sys.argv[3]}/{n}.npz", energy=energy, forces=forces, stress=stress)
"""


def one_task(encoder: str = "painn", dtype: torch.dtype = torch.float64, **values: object) -> AtomisticModel:
    whole = small_model(encoder, dtype=dtype, layers=1, max_degree=2, correlation=2)
    chosen = with_tasks(whole, ["task1"])
    if values:
        chosen = AtomisticModel(whole.settings, [facts("task1", **values)]).to(dtype).eval()
    return chosen


def structures() -> list[Atoms]:
    slab = rattled_crystal(4)
    slab.pbc = [True, True, False]
    far = Atoms("H2", positions=[[0, 0, 0], [0, 0, 40]])
    return [rattled_molecule(), rattled_crystal(), slab, bulk("Na"), rattled_molecule("H2O", 3), far, Atoms("H")]


def compare(model: AtomisticModel, function) -> None:
    for atoms in structures():
        row = Potential(model).predict([atoms])[0]
        found = function(*package_inputs(model, to_structure(atoms)))
        assert float(found[0].detach()) == pytest.approx(row["energy"], abs=1e-9)
        np.testing.assert_allclose(found[1].detach().numpy(), row["forces"], atol=1e-10)
        expected = np.zeros((3, 3)) if row["stress"] is None else row["stress"]
        np.testing.assert_allclose(found[2].detach().numpy(), expected, atol=1e-11)
        for value, wanted in zip(found[3:], row["targets"].values(), strict=True):
            np.testing.assert_allclose(value.detach().numpy().reshape(np.shape(wanted)), wanted, atol=1e-9)


@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_one_graph_serves_all_sizes(encoder):
    model = one_task(encoder)
    graph, _ = trace_model(model)
    compare(model, graph)


def test_charge_and_targets_are_in_the_graph():
    charges, dipole = TargetFacts(of="atom", kind="scalar", unit="e"), TargetFacts(of="structure", kind="vector")
    targets = {"charges": charges, "dipole": dipole}
    model = one_task(charge_spin=True, targets=targets)
    graph, example = trace_model(model)
    assert len(example) == 8
    compare(model, graph)


def test_a_graph_has_no_numbers_for_elements_that_the_task_has_not_seen():
    model = one_task(targets={"dipole": TargetFacts(of="structure", kind="vector")}, elements=["H", "O"])
    graph, _ = trace_model(model)
    inputs = package_inputs(model, to_structure(rattled_molecule("H2O")))
    assert not any(value.isnan().any() for value in graph(*inputs))
    for number in (6, 0, -1, 119, 285, 2**40):
        inputs[0][1] = number
        assert all(value.isnan().all() for value in graph(*inputs)), number


def test_a_graph_has_no_numbers_without_the_multiplicity_that_training_always_knew():
    for known, lowest in ((True, 1), (False, 0)):
        model = one_task(charge_spin=True, multiplicity_known=known)
        graph, _ = trace_model(model)
        for multiplicity in (-1, 0, 1, 3):
            inputs = package_inputs(model, to_structure(rattled_molecule("H2O"), multiplicity=multiplicity))
            assert bool(graph(*inputs)[0].isnan().all()) == (multiplicity < lowest)


def test_packages_that_cannot_be_made_are_refused_in_a_sentence(tmp_path):
    from click.testing import CliRunner

    path, out = tmp_path / "m.safetensors", tmp_path / "m.pt2"
    save_model(small_model(), path)

    def refused(*words: object) -> str:
        result = CliRunner().invoke(main, ["package", *map(str, words)])
        assert result.exit_code == 1 and result.output.count("Error: ") == 1, result.output
        return result.output

    assert "did you mean 'task1'" in refused(path, "--task", "tsk1", "--out", out)
    assert "must end in .pt2" in refused(path, "--task", "task1", "--out", tmp_path / "m.so")
    out.write_text("mine")
    assert "exists; remove it" in refused(path, "--task", "task1", "--out", out)
    assert out.read_text() == "mine"
    assert "does not exist" in refused(tmp_path / "none", "--task", "task1", "--out", tmp_path / "n.pt2")
    with pytest.raises(ModelFileError, match="the model has 2; choose one"):
        write_package(small_model(), tmp_path / "n.pt2", None)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_package_runs_without_this_library(tmp_path: Path, dtype):
    import ase.io

    model = one_task(dtype=dtype)
    write_package(model, tmp_path / "m.pt2", {"run": "a run"})
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    frames = structures()
    ase.io.write(tmp_path / "s.extxyz", frames)
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path / "m.pt2"), str(tmp_path / "s.extxyz"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    for n, atoms in enumerate(ase.io.read(tmp_path / "s.extxyz", index=":")):
        row, found = Potential(model).predict([atoms])[0], np.load(tmp_path / f"{n}.npz")
        assert found["energy"][0] == pytest.approx(row["energy"], abs=tolerance)
        np.testing.assert_allclose(found["forces"], row["forces"], atol=tolerance)
        if row["stress"] is not None:
            np.testing.assert_allclose(found["stress"], row["stress"], atol=tolerance)
    package = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    assert float(package.get_metadata()["cutoff"]) == CUTOFF
    inputs = package_inputs(model, to_structure(rattled_molecule("H2O")))
    for number in (29, 0, 119):
        inputs[0][0] = number
        assert all(value.isnan().all() for value in package(*inputs))
