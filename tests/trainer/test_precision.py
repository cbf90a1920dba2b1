"""Training precisions: what is rounded and what is not, which are offered where, and what is said of the others."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from sources import make_shards, metals
from structures import batch_of, facts, rattled_crystal, rattled_molecule, small_model, to_structure
from test_balance import labelled_batch, measured, trained_model
from torch.nn import functional

from hydrazero.launch.cli.main import main
from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders import ENCODERS
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.ops import exact
from hydrazero.models.ops.exact import ExactLinear, exact_linear, exact_matmul
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.precision import SUMS, check_device, for_deepspeed, precision_of
from hydrazero.trainer.engine.engine import train_step
from hydrazero.trainer.engine.step_guard import StepGuard

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
SUFFIXES = {
    "": "",
    "_fp64": "fp64",
    "_tf32": "tf32",
    "_bf16_autocast": "torch_autocast",
    "_bf16": "bf16",
    "_fp16": "fp16",
}
PLACES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def rounded(model: AtomisticModel, dtype: torch.dtype = torch.bfloat16) -> AtomisticModel:
    """The model as DeepSpeed's bf16 has it: weights rounded, buffers as they were."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.autocast = dtype
    return model


def widened(model: AtomisticModel) -> AtomisticModel:
    """The same weights in float32, nothing rounded on the way."""
    model = copy.deepcopy(model).to(torch.float32)
    model.autocast = None
    return model


def heavy_model(encoder: str) -> AtomisticModel:
    """References of a million eV per atom."""
    torch.manual_seed(7)
    settings = EncoderSettings(encoder=encoder, features=16, layers=2, radial_functions=8, cutoff=4.0, max_degree=2)
    far = {"H": -1.0e6 - 0.1, "C": -2.0e6, "O": -3.0e6, "Na": -4.0e6, "Cl": -5.0e6}
    return AtomisticModel(
        ModelSettings(encoder=settings, head_features=8, repulsion="zbl"),
        [facts("a", reference_energies=far, charge_spin=True), facts("b", reference_energies=far)],
    ).to(torch.float32)


@pytest.mark.parametrize("encoder", sorted(ENCODERS.builtin))
def test_only_the_products_of_features_are_rounded(encoder):
    """Energies on top of references of millions of eV, forces and geometry, with bf16 weights and under autocast."""
    model = rounded(heavy_model(encoder)).train()
    plain = widened(model).train()
    outputs: list[torch.Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, ExactLinear)]
    for layer in layers:
        layer.register_forward_hook(lambda _layer, given, out: outputs.extend([given[0], out]))
    far = rattled_molecule(seed=3)
    far.positions += 5000.0
    structures = [to_structure(rattled_molecule(seed=3)), to_structure(rattled_crystal(4)), to_structure(far)]
    batch = batch_of(structures, [0, 1, 0], dtype=torch.float32)
    found, expected = model(batch), plain(batch)
    assert outputs and all(tensor.dtype == torch.float32 for tensor in outputs)
    assert found.energy.dtype == found.reference.dtype == torch.float64
    assert found.interaction.dtype == found.forces.dtype == found.stress.dtype == torch.float32
    assert torch.equal(found.reference, expected.reference) and float(found.reference.min()) < -1e6
    torch.testing.assert_close(found.energy - found.reference, found.interaction.double(), rtol=0, atol=1e-8)
    strain = torch.zeros(3, 3, 3)
    for one, other in zip(
        *(m._encode(batch, batch.task, batch.positions, strain) for m in (model, plain)), strict=True
    ):
        if hasattr(one, "radial"):
            assert torch.equal(one.radial, other.radial) and torch.equal(one.directions, other.directions)
            assert one.distances.dtype == torch.float32
        else:
            assert one.scalars.dtype == torch.float32
    scale = float(expected.forces.detach().abs().max())
    assert 1e-6 * scale < float((found.forces - expected.forces).abs().max()) < 0.05 * scale
    # Opposite pairs pull with the same force, to the last digits of float32, whatever the features are.
    assert float(found.forces[:9].sum(0).abs().max()) < 1e-5 * scale
    # 5 km away the same structure has the same energy, to the roundings that its last digits decide.
    assert float((found.interaction[0] - found.interaction[2]).abs()) < 0.02 * (1 + float(found.interaction[0].abs()))


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_a_compiled_step_has_the_precision_of_an_eager_one(mode, monkeypatch):
    """Loss, every gradient, and the gradients of tasks, which are float64 sums of float32 measurements."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)  # the trace; test_zero.py compiles
    batch, trained = labelled_batch(), trained_model(dtype=torch.float32)
    batch = batch_of_dtype(batch, torch.float32)
    exactly = measured(trained, batch)
    trained.zero_grad()
    trained.model.autocast = torch.bfloat16
    if mode == "bf16":
        for parameter in trained.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    eager = measured(trained, batch)
    gradients = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
    assert all(g.dtype == (torch.bfloat16 if mode == "bf16" else torch.float32) for g in gradients.values())
    trained.zero_grad()
    assert trained.compile_steps() is None
    compiled = measured(trained, batch)
    assert eager.dtype == compiled.dtype == torch.float64
    size = exactly.norm(dim=1)
    assert bool(((eager - exactly).norm(dim=1) < 0.05 * size).all() and ((eager - exactly).norm(dim=1) > 0).all())
    assert bool(((compiled - eager).norm(dim=1) < 0.02 * size).all())
    for name, p in trained.named_parameters():
        if p.grad is not None:
            assert (p.grad - gradients[name]).norm() < 0.03 * gradients[name].norm() + 1e-6, name


def batch_of_dtype(batch, dtype: torch.dtype):
    """Everything of the batch in a precision, but energies."""
    batch = copy.copy(batch)
    for name, value in batch.to_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "energy":
            batch[name] = value.to(dtype)
    return batch


def test_exact_products_under_autocast_and_tf32(monkeypatch):
    torch.manual_seed(1)
    x, weight, bias = torch.randn(40, 30), torch.randn(7, 30), torch.randn(7)
    plain = functional.linear(x, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.linear(x, weight, bias).dtype == torch.bfloat16
        assert torch.equal(exact_linear(x, weight, bias), plain)
    assert torch.equal(exact_linear(x, weight.bfloat16()), functional.linear(x, weight.bfloat16().float()))
    monkeypatch.setattr(exact, "rounds_to_tf32", lambda tensor: tensor.dtype == torch.float32)
    wide = functional.linear(x.double(), weight.double(), bias.double())
    assert torch.equal(exact_linear(x, weight, bias), wide.float())
    assert torch.equal(exact_matmul(x, weight.t()), (x.double() @ weight.t().double()).float())
    model = small_model(dtype=torch.float32)
    batch = batch_of([to_structure(rattled_molecule())], dtype=torch.float32)
    widely = model(batch)
    monkeypatch.undo()
    for name in ("interaction", "forces"):
        one, other = getattr(widely, name), getattr(model(batch), name)
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def document_of(name: str, **changes: object) -> dict:
    return deepspeed_config({"config": name, **changes}, steps=100)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_precision_has_a_configuration_of_every_stage(place, suffix):
    document = document_of(place + suffix)
    precision = precision_of(document)
    assert precision.key == SUFFIXES[suffix]
    zero = document["zero_optimization"]
    assert zero["stage"] == int(place[4]) and zero["stage"] in precision.stages
    assert ("offload_optimizer" in zero) == ("offload" in place)
    assert ("offload_param" in zero) == (place == "zero3_offload")
    given = for_deepspeed(document, precision)
    assert not {"fp64", "tf32", "torch_autocast"} & given.keys()
    assert (precision.key in ("bf16", "fp16")) == (SUMS.items() <= given.items())
    assert zero.get("reduce_scatter", True) and given["zero_optimization"].get("reduce_scatter", True) == (
        suffix != "_fp64"
    )


@pytest.mark.parametrize("asked, fused", [({}, True), ({"fused": False}, False), ({"foreach": True}, None)])
def test_adam_is_fused_unless_the_configuration_says_otherwise(asked, fused):
    document = document_of("zero1", optimizer={"params": asked})
    given = for_deepspeed(document, precision_of(document))["optimizer"]["params"]
    assert given.get("fused") is fused and "fused" not in document["optimizer"]["params"].keys() - asked.keys()


def test_configurations_differ_in_what_their_names_say():
    """Precisions add their own tables, stages have their own ZeRO; all else is the same in all of them."""
    documents = {path.stem: json.loads(path.read_text()) for path in DS_CONFIGS.glob("*.json")}
    assert {place + suffix for place in PLACES for suffix in SUFFIXES} | {"zero0"} <= documents.keys()
    own = {"fp64", "tf32", "torch_autocast", "bf16", "fp16", *SUMS}
    shared = {"zero_optimization", "zero_force_ds_cpu_optimizer"}
    tables: dict[str, dict] = {}
    for name, document in documents.items():
        place, suffix = next(
            (name.removesuffix(s), s) for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)
        )
        table = {key: value for key, value in document.items() if key in own}
        assert tables.setdefault(suffix, table) == table, name
        zero = {key: value for key, value in document.items() if key in shared}
        assert tables.setdefault(place, zero) == zero, name
        rest = {key: value for key, value in document.items() if key not in own | shared}
        assert tables.setdefault("rest", rest) == rest, name


REFUSED: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "misspelt name": ("zero1_bf61", {}, ("zero1_bf61", "did you mean 'zero1_bf16'")),
    "misspelt table": ("zero1", {"fp46": {"enabled": True}}, ("fp46 is not known", "did you mean 'fp64'")),
    "old name": ("zero1", {"bfloat16": {"enabled": True}}, ("bfloat16 is not supported", "bf16")),
    "apex": ("zero1", {"amp": {"enabled": True}}, ("amp is not supported",)),
    "two": ("zero1_bf16", {"fp64": {"enabled": True}}, ("fp64 and bf16 are both enabled",)),
    "neither on nor off": ("zero1", {"bf16": {"enabled": "auto"}}, ("bf16.enabled is 'auto'",)),
    "fp64 without ZeRO": ("zero0", {"fp64": {"enabled": True}}, ("fp64", "stages 1, 2, 3, not with 0")),
    "bf16 without ZeRO": ("zero0", {"bf16": {"enabled": True}}, ("bf16", "not with 0")),
    "autocast to float16": ("zero1", {"torch_autocast": {"enabled": True, "dtype": "float16"}}, ("'bfloat16'", "fp16")),
    "autocast of chosen modules": (
        "zero1_bf16_autocast",
        {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}},
        ("lower_precision_safe_modules is not known",),
    ),
    "masters in bf16": (
        "zero1_bf16",
        {"bf16": {"bf16_master_weights_and_grads": True}},
        ("master weights are float32",),
    ),
    "unchecked gradients": ("zero1_bf16", {"bf16": {"check_grad_overflow": False}}, ("check_grad_overflow",)),
    "sums in bf16": ("zero1_bf16", {"data_types": {"grad_accum_dtype": "bf16"}}, ("summed in float32",)),
    "inputs in fp16": ("zero1_fp16", {"fp16": {"auto_cast": True}}, ("positions and labels are float32",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_offered_is_said(name):
    config, changes, words = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        document_of(config, **changes)
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


def test_what_needs_a_gpu_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shards = make_shards(tmp_path, "metals", metals(30))
    path = tmp_path / "run.toml"
    for config, instead in (("zero1_fp16", "zero1_bf16"), ("zero2_tf32", "zero1")):
        path.write_text(
            f'[run]\nout = "{tmp_path / "run"}"\n[[tasks]]\nname = "metals"\nshards = "{shards}"\n'
            f'[train]\nsteps = 2\n[deepspeed]\nconfig = "{config}"\n'
        )
        result = CliRunner().invoke(main, ["train", str(path)])
        assert result.exit_code == 1 and "needs a GPU" in result.stderr and instead in result.stderr
        assert not (tmp_path / "run").exists()
    for precision in (precision_of(document_of("zero1_fp16")), precision_of(document_of("zero1_tf32"))):
        check_device(precision, has_gpu=True)


class ScaledEngine:
    """As much of an engine in fp16 as a step asks for; DeepSpeed has none without a GPU, but its scaler runs."""

    def __init__(self, module, scale: float, overflows_above: float) -> None:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        scaler = DynamicLossScaler(scale, 1000, 1, delayed_shift=1, consecutive_hysteresis=False)
        scaler.raise_error_at_min_scale = False
        self.module, self.optimizer, self.above = module, SimpleNamespace(loss_scaler=scaler), overflows_above
        self.skipped_steps = 0
        self.loss = torch.zeros(())

    def __call__(self, batch, counts):
        return self.module(batch, counts)

    def fp16_enabled(self) -> bool:
        return True

    def zero_optimization_stage(self) -> int:
        return 1

    def backward(self, loss) -> None:
        self.loss = loss.detach()

    def step(self) -> None:
        scaler = self.optimizer.loss_scaler
        overflow = not math.isfinite(float(self.loss)) or scaler.cur_scale > self.above
        self.skipped_steps += overflow
        scaler.update_scale(overflow)


def test_looking_for_the_scale_of_the_loss_is_no_broken_step(monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist", SimpleNamespace(get_rank=lambda: 1))  # it logs
    batch, guard = labelled_batch(), StepGuard(3, 0.0)
    engine = ScaledEngine(trained_model(), scale=64.0, overflows_above=8.0)
    results = [train_step(engine, [batch], guard, stop=False) for _ in range(5)]
    assert [result.skipped for result in results] == [True, True, True, False, False]
    assert [result.rescaled for result in results] == [True, True, True, False, False]
    said = [guard.rescale(step) for step in (1, 2, 3)]
    assert "too large for the scale of the loss" in said[0] and said[1:] == [None, None]
    assert guard.rescaled == 3 and guard.skipped == guard.in_a_row == 0
    bad = copy.copy(batch)
    bad.energy = bad.energy * math.nan
    broken = train_step(engine, [bad], guard, stop=False)
    assert broken.skipped and not broken.rescaled  # the loss itself is at fault
    hopeless = ScaledEngine(trained_model(), scale=2.0, overflows_above=0.5)
    results = [train_step(hopeless, [batch], guard, stop=False) for _ in range(3)]
    assert [result.rescaled for result in results] == [True, False, False]  # there is no smaller scale
    assert all(result.skipped for result in results)
