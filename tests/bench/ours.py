"""Time per step of our PaiNN with energies and forces, training and inference: eager, compiled, and with bfloat16."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from systems import CUTOFF, FEATURES, LAYERS, RADIAL_FUNCTIONS, SYSTEMS, THREADS
from timing import hand_over, peak_megabytes, step_seconds
from torch import Tensor

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.inference.potential import structure_from_atoms
from hydrazero.models.model_settings import ModelSettings
from hydrazero.models.ops.compiled import CompiledModel
from hydrazero.models.task_facts import TaskFacts
from hydrazero.shards.graphs.graph import GraphBatch, collate, graph_sample, shape_holding
from hydrazero.trainer.balance import BalanceFacts, BalanceSection
from hydrazero.trainer.config.sections import LossSection
from hydrazero.trainer.engine.losses import make_objective
from hydrazero.trainer.engine.model_with_loss import ModelWithLoss
from hydrazero.trainer.engine.run_balance import RunBalance

MANY_HEADS = 16
EVERY = 50


def model_of(tasks: int, **settings: Any) -> AtomisticModel:
    """Return a model with the settings of the benchmark's PaiNN, or others."""
    torch.manual_seed(0)
    same = {"features": FEATURES, "layers": LAYERS, "radial_functions": RADIAL_FUNCTIONS, "cutoff": CUTOFF}
    encoder = EncoderSettings(**(settings or same))
    facts = [
        TaskFacts(name=f"bench{n}", reference_energies={}, scale=1.0, elements=["C", "Cu", "H"]) for n in range(tasks)
    ]
    return AtomisticModel(ModelSettings(encoder=encoder), facts)


def batch_of(name: str, tasks: int, count: int | None = None) -> GraphBatch:
    """Return a batch of a system's first `count` structures, by default all, labelled and assigned to tasks in turn."""
    structures = [structure_from_atoms(atoms) for atoms in SYSTEMS[name]()[:count]]
    samples = [graph_sample(structure, number % tasks, CUTOFF) for number, structure in enumerate(structures)]
    batch = collate(samples, shape_holding(samples), torch.float32)
    batch.forces = torch.randn(batch.forces.shape, generator=torch.Generator().manual_seed(1))
    batch.forces_mask, batch.energy_mask = batch.atom_mask.clone(), batch.structure_mask.clone()
    return batch


class Steps:
    """Training and inference of one model on one batch."""

    def __init__(self, model: AtomisticModel, batch: GraphBatch, *, compiled: bool) -> None:
        goal = make_objective(model, LossSection(), [1.0] * len(model.tasks))
        self.trained, self.batch, self.counts = ModelWithLoss(model, goal), batch, goal.counts(batch)
        if compiled and (reason := self.trained.compile_steps()):
            raise SystemExit(f"the kernels are missing: {reason}")
        self.predict = CompiledModel(model) if compiled else model

    def train(self) -> Tensor:
        self.trained.train()
        self.trained.zero_grad()
        loss, sums = self.trained(self.batch, self.counts)
        loss.backward()
        return sums

    def infer(self) -> None:
        self.trained.eval()
        assert np.isfinite(float(self.predict(self.batch).interaction.sum()))

    def energies(self) -> None:
        self.predict.energies_of_all_tasks(self.batch)


def balance_seconds(rounds: int) -> dict[str, list[float]]:
    """Return the seconds of EVERY training steps of sixteen tasks, with and without a gradient-norm measurement.

    Gradients are measured in the last of the steps.
    """
    facts = BalanceFacts(structures=tuple(range(1, MANY_HEADS + 1)))
    batch = batch_of("benzene", MANY_HEADS)
    runs = {}
    for name, section in (
        ("with", BalanceSection(method="gradnorm", every=EVERY)),
        ("without", BalanceSection(method="uniform", every=0)),
    ):
        steps = Steps(model_of(MANY_HEADS), batch, compiled=False)
        balance = RunBalance(section, facts, steps.trained)
        if reason := steps.trained.compile_steps():
            raise SystemExit(f"the kernels are missing: {reason}")
        runs[name] = (steps, balance)

    def many_steps(steps: Steps, balance: RunBalance) -> None:
        for step in range(1, EVERY + 1):
            balance.prepare(step)
            sums = steps.train()
            balance.update(step, steps.trained.objective.by_task(sums, steps.counts).cpu())

    seconds: dict[str, list[float]] = {"balance_with": [], "balance_without": []}
    for _ in range(rounds):
        for name, (steps, balance) in runs.items():
            seconds[f"balance_{name}"] += step_seconds(lambda s=steps, b=balance: many_steps(s, b), 1)
    return seconds


def main() -> None:
    repeats = int(sys.argv[1])
    torch.set_num_threads(THREADS)
    seconds: dict[str, list[float]] = {}
    for name in SYSTEMS:
        batch = batch_of(name, 1)
        eager = Steps(model_of(1), batch, compiled=False)
        seconds[f"eager_train_{name}"] = step_seconds(eager.train, repeats)
        seconds[f"eager_infer_{name}"] = step_seconds(eager.infer, repeats)
        for suffix, precision in (("", None), ("_bf16", torch.bfloat16)):
            model = model_of(1)
            model.autocast = precision
            steps = Steps(model, batch, compiled=True)
            seconds[f"compiled_train_{name}{suffix}"] = step_seconds(steps.train, 2 * repeats)
            seconds[f"compiled_infer_{name}{suffix}"] = step_seconds(steps.infer, 2 * repeats)
            seconds[f"memory_{name}{suffix}"] = [peak_megabytes(steps.train)]
    one, many = (Steps(model_of(n), batch_of("benzene", n), compiled=True) for n in (1, MANY_HEADS))
    for kind in ("train", "energies"):
        for _ in range(3):  # alternately, so that other load on the machine affects both
            for label, steps in (("one", one), ("many", many)):
                seconds.setdefault(f"heads_{kind}_{label}", []).extend(step_seconds(getattr(steps, kind), repeats))
    seconds.update(balance_seconds(7))
    hand_over(seconds)


if __name__ == "__main__":
    main()
