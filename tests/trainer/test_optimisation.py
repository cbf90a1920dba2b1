"""What optimisation is made of: losses of force vectors, weights that change, schedules, groups, frozen weights."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sources import make_shards, metals, molecules
from structures import batch_of, rattled_crystal, rattled_molecule, small_model, to_structure
from test_training import write_run

from hydrazero.launch.cli.main import main
from hydrazero.models.atomistic import model_from_facts
from hydrazero.models.encoders import ENCODERS
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.checkpoint.model_of_run import model_of_run
from hydrazero.trainer.config.schedule_shapes import Plateau, StableDecay, own_shape
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.engine.losses import make_objective, pointwise_loss
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.engine.parameter_groups import freeze, parameter_groups
from hydrazero.trainer.engine.schedules import Schedule
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("optimisation")
    make_shards(root, "molecules", molecules(60))
    make_shards(root, "metals", metals(20))
    return root


def labelled_batch(rotation: torch.Tensor | None = None) -> GraphBatch:
    """A molecule and a crystal with made-up forces, which a rotation turns along with the molecule."""
    generator = torch.Generator().manual_seed(1)
    turn = torch.eye(3, dtype=torch.float64) if rotation is None else rotation
    structures = []
    for number, atoms in enumerate((rattled_molecule(), rattled_crystal())):
        forces = torch.randn(len(atoms), 3, generator=generator, dtype=torch.float64) @ turn.T
        atoms.positions = atoms.positions @ turn.T.numpy()
        atoms.set_cell(atoms.cell[:] @ turn.T.numpy())
        structures.append(to_structure(atoms, f"made#{number}", energy=-1000.0, forces=forces.numpy()))
    return batch_of(structures, [0, 1], extra=(1, 3, 2))


def loss_of(batch: GraphBatch, **changes: object) -> tuple[torch.Tensor, ModelWithLoss]:
    model = small_model().train()
    trained = ModelWithLoss(model, make_objective(model, LossSection(stress_weight=0.0, **changes), [1.0, 1.0]))
    loss, _ = trained(batch, trained.objective.counts(batch))
    return loss, trained


def test_only_the_norm_of_force_errors_is_the_same_in_every_frame():
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    still, turned = labelled_batch(), labelled_batch(turn)
    by_norm = [float(loss_of(batch, kind="l1", force_errors="norm")[0].detach()) for batch in (still, turned)]
    by_component = [float(loss_of(batch, kind="l1")[0].detach()) for batch in (still, turned)]
    assert by_norm[0] == pytest.approx(by_norm[1], rel=1e-9)
    assert abs(by_component[0] - by_component[1]) > 1e-3
    squares = [float(loss_of(still, kind="l2", force_errors=errors)[0].detach()) for errors in ("components", "norm")]
    assert squares[0] == pytest.approx(squares[1], rel=1e-9)  # a squared length is a sum of squares


def test_the_norm_of_an_error_of_zero_has_a_gradient():
    batch = labelled_batch()
    model = small_model()
    batch.forces = model(batch).forces.detach()
    loss, trained = loss_of(batch, kind="l1", force_errors="norm")
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in trained.parameters() if p.grad is not None)


def test_the_huber_loss_is_quadratic_below_delta_and_grows_linearly_above():
    errors = torch.tensor([-0.5, 0.01, 1.0, 3.0, -20.0], dtype=torch.float64, requires_grad=True)
    losses = pointwise_loss(errors, LossSection(kind="huber", huber_delta=1.0))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.125, 5e-5, 0.5, 2.5, 19.5])
    assert errors.grad.tolist() == pytest.approx([-0.5, 0.01, 1.0, 1.0, -1.0])


def test_weights_of_quantities_change_on_the_way():
    batch = labelled_batch()
    change = {"final_weights": {"energy": 9.0, "forces": 0.5}, "change_from": 0.5, "change_until": 0.75}
    _, trained = loss_of(batch, energy_weight=1.0, forces_weight=4.5, **change)
    objective, found = trained.objective, []
    for share in (0.0, 0.5, 0.625, 0.75, 1.0):
        objective.weigh(share)
        found.append(objective.weights.tolist())
    assert found == [[1.0, 4.5], [1.0, 4.5], [5.0, 2.5], [9.0, 0.5], [9.0, 0.5]]
    sums = objective.sums(trained.model(batch), batch).detach()
    own = torch.ones(2, dtype=torch.float64)
    objective.weigh(0.0)
    before = objective.score(sums, own)
    objective.weigh(1.0)
    assert objective.score(sums, own) == before == pytest.approx(float(objective.total(sums, objective.counts(batch))))


def test_a_compiled_step_follows_the_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    batch = labelled_batch()
    _, eager = loss_of(batch, final_weights={"forces": 7.0})
    _, traced = loss_of(batch, final_weights={"forces": 7.0})
    traced.compile_steps()
    for share in (0.0, 1.0):
        losses = []
        for trained in (eager, traced):
            trained.objective.weigh(share)
            losses.append(float(trained(batch, trained.objective.counts(batch))[0].detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@given(st.integers(1, 400), st.integers(0, 100), st.floats(0.0, 1.0))
def test_warm_up_stable_decay(steps, warmup, decay):
    shape = StableDecay(total_num_steps=steps + warmup, warmup_num_steps=warmup, decay_share=decay)
    ratios = [shape.ratio(step, 0) for step in range(1, steps + warmup + 1)]
    assert all(0 < ratio <= 1 for ratio in ratios)
    assert all(a < b for a, b in pairwise(ratios[:warmup]))
    rest = ratios[warmup:]
    assert all(a >= b for a, b in pairwise(rest))
    assert rest[-1] == pytest.approx(shape.min_ratio)
    assert sum(ratio == 1.0 for ratio in rest) >= len(rest) - max(round(decay * (steps + warmup)), 1)


@pytest.mark.parametrize("name", ["decay_share", "min_ratio", "warmup_min_ratio"])
def test_shares_of_a_schedule_are_at_most_one(name):
    params = {"total_num_steps": 100, name: 2}
    with pytest.raises(ConfigError, match=f"scheduler.params.{name} is 2; it must be a fraction, from 0 to 1"):
        own_shape({"scheduler": {"type": "WarmupStableDecayLR", "params": params}})


def test_the_rate_falls_when_the_loss_stays_and_goes_on_after_a_resume():
    def schedule() -> tuple[Schedule, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        return Schedule(optimizer, Plateau(warmup_num_steps=2, patience=2, factor=0.5)), optimizer

    whole, optimizer = schedule()
    rates = []
    for loss in (5.0, 4.0, 4.0, 4.5, 3.9, 4.0, 4.0):
        whole.step()
        whole.report(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1])
    again, other = schedule()
    again.load_state_dict(whole.state_dict())
    assert other.param_groups[0]["lr"] == pytest.approx(0.1) and again.get_lr() == whole.get_lr()


@pytest.mark.parametrize("encoder", list(ENCODERS.builtin))
def test_biases_and_embeddings_do_not_decay(encoder):
    model = small_model(encoder)
    decaying, staying = parameter_groups(model)
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)] for p in staying["params"]} >= {name for name in named.values() if name.endswith("bias")}
    assert "embedding.elements" in {named[id(p)] for p in staying["params"]}
    assert staying["weight_decay"] == 0.0 and "weight_decay" not in decaying
    assert all(p.dim() >= 2 for p in decaying["params"])
    assert len(decaying["params"]) + len(staying["params"]) == len(named)


def test_patterns_freeze_parameters():
    model = small_model()
    freeze(model, ["encoder.*", "embedding.*"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith(("encoder.", "embedding.")) for name in trained)
    with pytest.raises(ConfigError, match=r"'encodr.\*' matches no parameter"):
        freeze(model, ["encodr.*"])
    with pytest.raises(ConfigError, match="freezes every parameter"):
        freeze(model, ["*"])


@pytest.mark.parametrize(
    ("config", "compiled"), [("zero0", "false"), ("zero1", "false"), ("zero1", "true"), ("zero3", "false")]
)
def test_a_run_with_all_of_it(data, tmp_path, monkeypatch, config, compiled):
    """The encoder frozen, a stable phase and a decay, force norms, weights that change, and a stop when it stalls."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    path = write_run(tmp_path, data, config)
    changes = {
        "run.seed": 3,
        "train.freeze": '["encoder.*"]',
        "train.compile": compiled,
        "loss.force_errors": "norm",
        "loss.final_weights": "{energy = 10.0, forces = 0.1}",
        "deepspeed.scheduler.type": "WarmupStableDecayLR",
        "deepspeed.scheduler.params": "{warmup_num_steps = 2, decay_share = 0.5}",
        "train.evaluate_every": 1,
        "train.patience": 2,
    }
    arguments = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(main, ["train", str(path), *arguments])
    assert result.exit_code == 0, result.output
    rows = read_metrics(tmp_path / "run")
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates[1] == max(rates) == pytest.approx(1e-3)
    weights = model_of_run(tmp_path / "run", "last", averaged=False).state_dict()
    torch.manual_seed(changes["run.seed"])
    begun = model_from_facts(read_json(tmp_path / "run" / MODEL_FACTS_NAME)).state_dict()
    moved = {name for name, value in weights.items() if not torch.equal(value, begun[name])}
    assert moved and not any(name.startswith("encoder.") for name in moved)


def test_a_stall_stops_the_run(data, tmp_path):
    path = write_run(tmp_path, data)
    changes = ["train.steps=30", "train.evaluate_every=1", "train.patience=2", "deepspeed.optimizer.params.lr=0.0"]
    result = CliRunner().invoke(main, ["train", str(path), *(w for change in changes for w in ("--set", change))])
    assert result.exit_code == 0, result.output
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if row["kind"] == "evaluation"]
    assert len(losses) == 3 and min(losses) == losses[0]


def test_from_direct_to_conservative_the_encoder_stays(data, tmp_path):
    """A first phase with direct forces; the second starts with its weights, and a rate of zero shows which."""
    task = 'name = "metals"'
    for phase, forces in (("first", "direct"), ("second", "conservative")):
        path = write_run(tmp_path / phase, data)
        path.write_text(path.read_text().replace(task, f'{task}\nforces = "{forces}"'))
        changes = ["train.steps=2", "train.average=0.0"]
        if phase == "second":
            changes += [f"run.start_from={tmp_path}/first/run", "deepspeed.optimizer.params.lr=0.0", "run.seed=5"]
        result = CliRunner().invoke(main, ["train", str(path), *(w for change in changes for w in ("--set", change))])
        assert result.exit_code == 0, result.output
    first, second = (model_of_run(tmp_path / phase / "run") for phase in ("first", "second"))
    assert first.forces_head is not None and second.forces_head is None
    before = first.state_dict()
    for name, value in second.state_dict().items():
        assert torch.equal(value, before[name]), name
    # A run that was killed before its first checkpoint starts from there again.
    shutil.rmtree(tmp_path / "second" / "run" / "checkpoints")
    again = CliRunner().invoke(
        main, ["train", str(path), "--resume", *(w for change in changes for w in ("--set", change))]
    )
    assert again.exit_code == 0 and "starts again from step 0" in again.output and "started from" in again.output
    for name, value in model_of_run(tmp_path / "second" / "run").state_dict().items():
        assert torch.equal(value, before[name]), name
    wrong = CliRunner().invoke(
        main,
        [
            "train",
            str(path),
            "--set",
            f"run.start_from={tmp_path}/first/run",
            "--set",
            "model.features=16",
            "--set",
            f"run.out={tmp_path}/third",
        ],
    )
    assert wrong.exit_code == 1 and "has model.features = 12; set the same" in wrong.output
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.start_from=nowhere", "nowhere does not exist"),
        ("loss.force_errors=nrom", "did you mean 'norm'"),
        ("loss.change_from=0.9", "change_from <= change_until"),
        ("loss.final_weights={energy = -1.0}", "loss.final_weights.energy"),
        ("loss.final_weights={energi = 1.0}", "did you mean 'energy'"),
        ("train.freeze=['encodr.*']", "matches no parameter"),
        ("train.average=1.0", "train.average"),
        ("deepspeed.scheduler={type = 'WarmupPlateauLR', params = {patients = 3}}", "did you mean 'patience'"),
    ],
)
def test_bad_settings_are_named(data, tmp_path, change, said):
    result = CliRunner().invoke(main, ["train", str(write_run(tmp_path, data)), "--set", change])
    assert result.exit_code == 1 and said in result.output and not (tmp_path / "run").exists(), result.output
