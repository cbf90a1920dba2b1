"""Balancing of tasks: measured gradients are exact, methods move weights where they should, bounds hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import run_ranks
from structures import batch_of, rattled_crystal, rattled_molecule, small_model, to_structure

from hydrazero.models import atomistic
from hydrazero.models.heads.task_linear import TaskRows
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.settings_parser import parse_settings
from hydrazero.trainer.balance import BALANCERS, BalanceFacts, BalanceSection, Observation, make_balancer
from hydrazero.trainer.balance.base import bounded
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.engine import model_with_loss as model_with_loss_module
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss, new_probe
from hydrazero.trainer.engine.run_balance import RunBalance
from hydrazero.trainer.engine.step_guard import StepGuard

TASKS = 3
UNKNOWN = float("nan")


def labelled_batch(seed: int = 0) -> GraphBatch:
    generator = torch.Generator().manual_seed(seed)
    structures = []
    atoms = [rattled_molecule(seed=seed), rattled_crystal(seed), rattled_molecule("H2O", seed), rattled_molecule("CH4")]
    for number, each in enumerate(atoms):
        forces = torch.randn(len(each), 3, generator=generator, dtype=torch.float64).numpy()
        structures.append(to_structure(each, f"made#{number}", energy=-1000.0 * number, forces=forces))
    return batch_of(structures, [0, 1, 0, 2], extra=(1, 3, 2))


def trained_model(weights: tuple[float, ...] = (1.0, 0.3, 2.0), **model: object) -> ModelWithLoss:
    built = small_model(tasks=TASKS, **model).train()
    loss = LossSection(kind="huber", energy_weight=2.0, stress_weight=0.0)
    return ModelWithLoss(built, make_objective(built, loss, weights))


def measured(trained: ModelWithLoss, batch: GraphBatch, factor: float = 1.0) -> torch.Tensor:
    trained.measuring = True
    loss, _ = trained(batch, trained.objective.counts(batch))
    (loss * factor).backward()
    found = trained.take_task_gradients()
    assert found is not None and trained.take_task_gradients() is None
    return found


def explicit_layer(x: torch.Tensor, probe: torch.Tensor, rows: TaskRows) -> torch.Tensor:
    return rows.matmul(x, probe + torch.eye(x.shape[1], dtype=x.dtype))


@pytest.mark.parametrize("encoder", ["painn", "schnet", "mace"])
def test_gradients_of_tasks_are_those_of_a_layer_that_is_the_identity(encoder, monkeypatch):
    """Of the energies' and the forces' losses; the factors that an engine puts on the loss don't show."""
    batch, trained = labelled_batch(), trained_model(encoder=encoder, max_degree=2)
    found = measured(trained, batch, factor=1000.0)
    monkeypatch.setattr(atomistic, "probed", explicit_layer)
    probe = new_probe(trained.model)
    objective = trained.objective
    loss = objective.total(objective.sums(trained.model(batch, probe), batch), objective.counts(batch))
    (expected,) = torch.autograd.grad(loss, probe)
    assert all(row.abs().max() > 1e-6 for row in expected)
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-9, atol=1e-12)


def test_compiled_steps_measure_the_same_or_nothing(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)  # the trace; test_compiled.py compiles
    batch, trained = labelled_batch(), trained_model()
    expected = measured(trained, batch)
    reference = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
    trained.zero_grad()
    trained.measuring = False
    assert trained.compile_steps() is None
    torch.testing.assert_close(measured(trained, batch, factor=3.0), expected, rtol=1e-9, atol=1e-12)
    for name, p in trained.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 3.0 * reference[name], rtol=1e-9, atol=1e-12)
    trained.zero_grad()
    trained.measuring = False
    loss, _ = trained(batch, trained.objective.counts(batch))
    loss.backward()
    assert trained.take_task_gradients() is None
    for name, p in trained.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, reference[name], rtol=1e-9, atol=1e-12)


def test_what_one_rank_cannot_compile_runs_eagerly_on_all(monkeypatch):
    """Each kind of graph by itself; ranks that mixed them would hand gradients over in different orders."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    batch, trained = labelled_batch(), trained_model()
    trained.compile_steps()
    reasons = iter([["", ""], ["", "no room"], ["", ""]])
    monkeypatch.setattr(model_with_loss_module, "gather_objects", lambda own: next(reasons))
    for measuring in (False, True, False, True):
        trained.measuring = measuring
        loss, _ = trained(batch, trained.objective.counts(batch))
        assert ("_KnownGradients" in str(loss.grad_fn)) != measuring
        loss.backward()
        assert (trained.take_task_gradients() is not None) == measuring
    trained.predict(batch)
    assert trained.not_compiled == {"steps that measure the tasks' gradients": "rank 1: no room"}


def test_another_method_than_the_checkpoints_starts_afresh():
    def balance(method: str) -> RunBalance:
        return RunBalance(BalanceSection(method=method), BalanceFacts(structures=(10, 100, 1000)), trained_model())

    before, static = balance("gradnorm"), balance("static")
    before.balancer.weights = torch.tensor([0.1, 0.2, 2.7], dtype=torch.float64)
    own = static.weights()
    static.load(before.state())
    assert static.weights() == own
    same = balance("gradnorm")
    same.load(before.state())
    assert same.weights() == pytest.approx({"task0": 0.1, "task1": 0.06, "task2": 5.4})


def test_fixed_weights_obey_bounds_that_have_changed():
    facts, trained = BalanceFacts(structures=(1, 1, 1000)), trained_model()
    before, now = (
        RunBalance(BalanceSection(method="static", smallest=smallest), facts, trained) for smallest in (0.05, 0.5)
    )
    now.load(before.state())
    assert float(before.balancer.weights.min()) == pytest.approx(0.05)
    assert float(now.balancer.weights.min()) == pytest.approx(0.5)


@pytest.mark.ranks
def test_norms_over_two_ranks_are_those_of_the_joined_batch(tmp_path):
    run_ranks("balance_ranks.py", 2, [str(tmp_path)])
    run_ranks("balance_ranks.py", 1, [str(tmp_path)])
    one, first, second = (torch.load(tmp_path / name) for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert first["norms"] == second["norms"] and first["weights"] == second["weights"]
    for name, norm in one["norms"].items():
        assert first["norms"][name] == pytest.approx(norm, rel=1e-9)
    torch.testing.assert_close(torch.tensor(first["cosines"]), torch.tensor(one["cosines"]), rtol=1e-9, atol=1e-9)


def test_gradnorm_brings_norms_together_that_differ_by_a_thousand():
    """One task's labels count a thousand times as much; within 200 steps its weighted gradient is as long as others."""
    trained = trained_model((1.0, 1000.0, 1.0))
    section = BalanceSection(method="gradnorm", every=10, alpha=0.0, smallest=1e-4, largest=1e4)
    balance = RunBalance(section, BalanceFacts(structures=(10, 10, 10)), trained)
    balance.own_weights.fill_(1.0)  # what was set above is a property of the data here, not of the loss
    scale = torch.tensor([1.0, 1000.0, 1.0], dtype=torch.float64)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    ratios = []
    for step in range(1, 201):
        batch = labelled_batch(step % 5)
        balance.prepare(step)
        trained.objective.task_weights.mul_(scale)
        optimizer.zero_grad()
        loss, sums = trained(batch, counts := trained.objective.counts(batch))
        loss.backward()
        optimizer.step()
        trained.objective.task_weights.div_(scale)
        losses = trained.objective.by_task(sums, counts) * scale
        # The gradients of the losses as the scaled labels make them.
        if (row := balance.update(step, losses)) is not None:
            norms = torch.tensor([row["gradient_norms"][name] * row["weights"][name] for name in balance.names])
            ratios.append(float(norms.max() / norms.min()))
    assert ratios[0] < 1e3 and max(ratios[-5:]) < 5
    weights = balance.weights()
    assert weights["task1"] < 0.02 * min(weights["task0"], weights["task2"])


@given(
    st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20),
    st.floats(1e-3, 1.0),
    st.floats(1.0, 1e3),
)
def test_weights_have_the_mean_one_within_their_bounds(values, smallest, largest):
    raw = torch.tensor(values, dtype=torch.float64)
    weights = bounded(raw, smallest, largest)
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-6)
    assert float(weights.min()) >= smallest * (1 - 1e-12) and float(weights.max()) <= largest * (1 + 1e-12)
    order = raw.argsort()
    assert (weights[order].diff() >= -1e-9).all()


def run_method(method: str, losses: list[list[float]], **changes: float) -> torch.Tensor:
    section = BalanceSection(method=method, every=1, **changes)
    balancer = make_balancer(section, BalanceFacts(structures=(1000, 100, 10)))
    for step, row in enumerate(losses, start=1):
        balancer.update(step, Observation(losses=torch.tensor(row, dtype=torch.float64)))
    return balancer.weights


def test_fixed_weights():
    assert run_method("uniform", [[1.0, 2.0, 3.0]]).tolist() == [1.0, 1.0, 1.0]
    weights = run_method("static", [[1.0, 2.0, 3.0]])
    assert weights[1] / weights[0] == pytest.approx(min(10.0, float(weights[1]) / 0.05)) and weights[2] > weights[1]


def test_uncertainty_weighs_a_task_by_one_over_its_loss():
    weights = run_method("uncertainty", [[0.5, 1.0, UNKNOWN], [0.5, 1.0, 2.0]] * 1500, learning_rate=0.01)
    assert float(weights[0] / weights[1]) == pytest.approx(2.0, rel=0.05)
    assert float(weights[1] / weights[2]) == pytest.approx(2.0, rel=0.05)


def test_famo_turns_to_the_task_that_improves_least():
    """Shares of the improvement; the third task is away now and then."""
    losses = [[math.exp(-0.05 * n), math.exp(-0.001 * n), math.exp(-0.05 * n) if n % 3 else UNKNOWN] for n in range(60)]
    section = BalanceSection(method="famo", every=1)
    balancer = make_balancer(section, BalanceFacts(structures=(10, 10, 10)))
    for step, row in enumerate(losses, start=1):
        balancer.update(step, Observation(losses=torch.tensor(row, dtype=torch.float64)))
    shares = torch.softmax(balancer.logits, 0)
    assert shares[1] > 1.2 * shares[0] and shares[1] > 1.2 * shares[2]


@pytest.mark.parametrize("alpha", [1.0, 0.0, -0.5])
def test_gradnorm_weighs_slow_tasks_by_alpha_and_leaves_unknown_ones_at_the_middle(alpha):
    section = BalanceSection(method="gradnorm", alpha=alpha, smoothing=0.0, every=1)
    balancer = make_balancer(section, BalanceFacts(structures=(10, 10, 10)))
    gram = torch.tensor([[1.0, 0, UNKNOWN], [0, 1.0, UNKNOWN], [UNKNOWN] * 3], dtype=torch.float64)
    for losses in ([1.0, 1.0, UNKNOWN], [0.2, 0.8, UNKNOWN]):
        balancer.update(1, Observation(losses=torch.tensor(losses, dtype=torch.float64), gram=gram))
    weights = balancer.weights
    assert float(weights[1] / weights[0]) == pytest.approx(4.0**alpha)
    assert float(weights[2]) == pytest.approx(float(weights[0] * weights[1]) ** 0.5, rel=1e-6)


def norms_seen(*rows: tuple[list[float], list[float]], **settings: float) -> torch.Tensor:
    """Weights of gradnorm after measurements of (squared norms, losses)."""
    section = BalanceSection(method="gradnorm", every=1, **settings)
    balancer = make_balancer(section, BalanceFacts(structures=(10,) * len(rows[0][0])))
    for squares, losses in rows:
        gram = torch.tensor(squares, dtype=torch.float64).diag()
        balancer.update(1, Observation(losses=torch.tensor(losses, dtype=torch.float64), gram=gram))
    return balancer.weights


def test_one_outlier_among_gradients_does_not_hold_a_task_down():
    usual = ([1.0, 1.0], [1.0, 1.0])
    weights = norms_seen(usual, ([1e6, 1.0], [1.0, 1.0]), *[usual] * 30)
    assert 0.7 < float(weights[0] / weights[1]) < 1.0


def test_a_gradient_of_nothing_says_nothing_and_negative_losses_leave_weights_finite():
    """Weights of a task's losses may be 0 at first, and rise later."""
    usual = ([0.0, 1.0, 4.0], [1.0, 1.0, 1.0])
    weights = norms_seen(*[usual] * 3)
    assert float(weights[0]) == pytest.approx(float(weights[1] * weights[2]) ** 0.5)
    weights = norms_seen(*[usual] * 3, ([1.0, 1.0, 4.0], [0.5, -0.5, 0.5]), alpha=0.5, smoothing=0.0)
    assert torch.isfinite(weights).all() and float(weights[0] / weights[2]) == pytest.approx(2.0)


def test_a_change_of_weights_alone_is_no_spike():
    trained = trained_model((1.0, 1.0, 1.0))
    balance = RunBalance(BalanceSection(method="gradnorm", every=1), BalanceFacts(structures=(1, 1, 1)), trained)
    losses, guard = torch.tensor([10.0, 0.1, 0.1], dtype=torch.float64), StepGuard(max_skipped=3, spike=6.0)

    def loss() -> float:
        weights = trained.objective.task_weights.double()
        return float((weights * losses).sum() / weights.sum())

    for step in range(200):
        guard.done(loss() * (1.01 if step % 2 else 0.99))
    before = loss()
    balance._gram = lambda present: torch.tensor([1e-4, 1.0, 1.0], dtype=torch.float64).diag()
    balance.update(1, losses)
    assert loss() > 2 * before and guard.is_spike(loss())
    guard.shift(balance.shift)
    assert not guard.is_spike(loss()) and guard.is_spike(2 * loss())


@pytest.mark.parametrize("method", BALANCERS.names())
def test_a_state_goes_on_where_it_was(method):
    section = BalanceSection(method=method, every=2)
    facts = BalanceFacts(structures=(1000, 100, 10))
    generator = torch.Generator().manual_seed(0)
    seen = [
        Observation(
            losses=torch.rand(3, generator=generator, dtype=torch.float64), gram=torch.eye(3, dtype=torch.float64) * n
        )
        for n in range(1, 9)
    ]
    whole, part = make_balancer(section, facts), make_balancer(section, facts)
    for step, each in enumerate(seen, start=1):
        whole.update(step, each)
        if step == 5:
            state = part.state()
            part = make_balancer(section, facts)
            part.load(state)
        part.update(step, each)
    assert torch.equal(whole.weights, part.weights)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "gradnrom"}, r"unknown balance.method 'gradnrom' .did you mean 'gradnorm'"),
        ({"smallest": 2.0}, "balance.smallest"),
        ({"smoothing": 1.0}, "balance.smoothing"),
        ({"method": "gradnorm", "every": 0}, "balance.every"),
        ({"alpha": UNKNOWN}, "balance.alpha"),
    ],
)
def test_bad_settings_are_named(changes, said):
    document = {"run": {"out": ""}, "tasks": [{"name": "a", "shards": ""}], "train": {"steps": 1}, "balance": changes}
    with pytest.raises(ConfigError, match=f"^run.toml: {said}"):
        parse_settings(RunConfig, document, "run.toml:")
