"""Compiled graphs against eager mode, in float64: predictions, and the gradient of every parameter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from rank_processes import finished_alone
from structures import batch_of, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.models.encoders import ENCODERS
from hydrazero.models.ops.compiled import CompiledModel, use_kernels
from hydrazero.models.ops.kernels import KernelsUnavailable, cached_library
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss

TASKS = 2


def labelled_batch(dtype: torch.dtype = torch.float64) -> GraphBatch:
    generator = torch.Generator().manual_seed(3)
    structures = []
    for number, atoms in enumerate((rattled_molecule(), rattled_crystal(), rattled_molecule("H2O"))):
        forces = torch.randn(len(atoms), 3, generator=generator, dtype=torch.float64).numpy()
        structures.append(to_structure(atoms, f"made#{number}", energy=-1000.0 * number, forces=forces))
    return batch_of(structures, [0, 1, 0], dtype=dtype, extra=(2, 5, 3))


def trained_model(encoder: str, device: str = "cpu", **settings: object) -> ModelWithLoss:
    model = small_model(encoder, tasks=TASKS, **settings).train().to(device)
    loss = LossSection(kind="huber", energy_weight=0.7, forces_weight=1.3, stress_weight=0.0)
    return ModelWithLoss(model, make_objective(model, loss, [1.0, 0.4]))


def gradients(trained: ModelWithLoss, batch: GraphBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trained.zero_grad()
    loss, _ = trained(batch, trained.objective.counts(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
    return loss.detach(), found


def compare_steps(encoder: str, **settings: object) -> None:
    """Loss and every parameter's gradient of a step as one graph against eager."""
    batch = labelled_batch()
    # One layer where a second one has nothing new: compiling is most of the time.
    layers = 2 if encoder in ("painn", "mace", "lace") else 1
    trained = trained_model(encoder, layers=layers, max_degree=2, correlation=2, **settings)
    loss, expected = gradients(trained, batch)
    assert trained.compile_steps() is None
    compiled_loss, found = gradients(trained, batch)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-10, atol=1e-10)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-10), name


@pytest.fixture(params=["traced", pytest.param("compiled", marks=pytest.mark.compiler)])
def graphs(request, monkeypatch) -> None:
    """Run graphs as they are traced, where what a trace can lose is lost, and compiled, as test_zero.py does too."""
    if request.param == "traced":
        monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_every_gradient_of_a_step_as_one_graph_equals_eager(encoder):
    compare_steps(encoder)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("encoder", ["painn", "lace"])
def test_sums_that_the_kernels_leave_out_are_part_of_the_graph(encoder):
    compare_steps(encoder, features=8)


@pytest.mark.compiler
@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_compiled_predictions_equal_eager(encoder):
    batch = labelled_batch()
    model = small_model(encoder, tasks=TASKS, max_degree=2)
    expected = model(batch)
    assert use_kernels(model) is None
    found = CompiledModel(model)(batch)
    for name in ("interaction", "reference", "forces", "stress"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("graphs")
def test_a_compiled_step_sees_new_weights_and_new_task_weights():
    batch, trained = labelled_batch(), trained_model("painn")
    trained.compile_steps()
    before, _ = gradients(trained, batch)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.05)
    trained.objective.task_weights.copy_(torch.tensor([0.2, 2.0]))
    after, found = gradients(trained, batch)
    eager = trained_model("painn")
    eager.load_state_dict(trained.state_dict())
    eager.objective.task_weights.copy_(trained.objective.task_weights)
    loss, expected = gradients(eager, batch)
    assert abs(float(after - before)) > 1e-6
    torch.testing.assert_close(after, loss, rtol=1e-10, atol=1e-10)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("features", [16, 48])
def test_parameter_gradients_of_kernels_equal_those_of_plain_pytorch(features):
    from hydrazero.models.ops.kernels import load_kernels

    load_kernels()
    batch, results = labelled_batch(), []
    for kernels in (False, True):
        model = small_model("painn", features=features).train()
        model.kernels = kernels
        out = model(batch)
        loss = (out.forces**2).sum() + (out.stress**2).sum() + (out.interaction**2).sum()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for name, plain, kernel in zip(dict(model.named_parameters()), *results, strict=True):
        assert torch.allclose(kernel, plain, rtol=1e-9, atol=1e-9), name


def test_without_a_compiler_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    for compiler, said in (
        ("", "no C.. compiler"),
        ("/no/such/g++ -O2", "/no/such/g.. -O2 cannot be run"),
        ("/bin/false", "could not compile"),
    ):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(KernelsUnavailable, match=said):
            cached_library()


def test_without_a_compiler_steps_are_eager_and_the_reason_is_kept(tmp_path):
    (tmp_path / "script.py").write_text(
        "from test_compiled import gradients, labelled_batch, trained_model\n"
        "batch, (eager, other) = labelled_batch(), [trained_model('painn', layers=1) for _ in range(2)]\n"
        "print('said:', other.compile_steps())\n"
        "(_, expected), (_, found) = gradients(eager, batch), gradients(other, batch)\n"
        "assert all((found[name] == expected[name]).all() for name in expected)\n"
        "other.predict(batch)\n"
        "print('kept:', other.not_compiled['predictions'])\n"
    )
    places = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    status, output = finished_alone([tmp_path / "script.py"], CXX="", **places)
    assert status == 0, output
    assert "said: no C++ compiler" in output and "kept: rank 0: InvalidCxxCompiler: No working C++ compiler" in output


def test_rows_out_of_order_are_refused():
    use_kernels(small_model())
    values = torch.ones(3, 2, dtype=torch.float64)
    for owner in ([1, 0, 2], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(RuntimeError, match="in the order of their atoms"):
            torch.ops.hydrazero.segment_sum(torch.tensor(owner), values, None, 3)


@pytest.mark.compiler
def test_what_a_killed_compiler_left_is_compiled_again(tmp_path):
    script = (
        "import torch\n"
        "from hydrazero.models.ops.compiled import compile_traced\n"
        "inputs = [torch.ones(1000), torch.ones(1000)]\n"
        "print(float(compile_traced(lambda given: (given[0].sqrt() * given[1],), inputs)(inputs)[0].sum()))\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "1000.0\n"
        libraries = [path for path in tmp_path.rglob("*.so") if path.stat().st_size > 100]
        assert libraries
        for number, path in enumerate(libraries):
            path.write_bytes(path.read_bytes()[: 100 * (number % 2)])
