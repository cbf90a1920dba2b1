"""The training loop: batches in, steps, what is logged, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.shards.graph import GraphBatch
from hydrazero.shards.stream import StreamSettings, TrainStream, empty_batch, evaluation_batches
from hydrazero.trainer.checkpoint import save_checkpoint
from hydrazero.trainer.config import RunConfig
from hydrazero.trainer.console import RunLog
from hydrazero.trainer.distributed import device, rank, ranks, sum_over_ranks
from hydrazero.trainer.engine import train_step
from hydrazero.trainer.losses import COLUMNS, Objective, errors_by_task


@dataclass(kw_only=True)
class Interval:
    """What has gathered since the last line of the log."""

    sums: Tensor
    loss: float = 0.0
    steps: int = 0
    atoms: int = 0
    waited: float = 0.0
    """Seconds that this rank stood still for data."""
    since: float = 0.0
    """Clock at its start."""


def new_interval(tasks: int) -> Interval:
    """Return an empty interval that starts now."""
    return Interval(sums=torch.zeros(tasks, len(COLUMNS), dtype=torch.float64), since=time.monotonic())


class Trainer:
    """A run in progress on one rank."""

    def __init__(self, config: RunConfig, engine: Any, stream: TrainStream, log: RunLog, start: int) -> None:
        self.config, self.engine, self.stream, self.log = config, engine, stream, log
        self.step = start
        self.run_dir = Path(config.run.out)
        model: AtomisticModel = engine.module
        self.names = [task.name for task in model.tasks]
        self.objective = Objective(
            settings=config.loss,
            task_weights=torch.tensor([t.weight for t in config.tasks], dtype=torch.float64, device=device()),
            scales=model.scales.to(device()),
        )

    def train(self) -> None:
        """Train up to the configured number of steps, with a checkpoint at the end."""
        settings = self.config.train
        batches = iter(self.stream)
        interval = new_interval(len(self.names))
        self.engine.train()
        while self.step < settings.steps:
            self._one_step(batches, interval)
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                self._log_interval(interval)
                interval = new_interval(len(self.names))
            if self.step % settings.evaluate_every == 0 or self.step == settings.steps:
                self._evaluate()
                interval.since = time.monotonic()
            if self.step % settings.checkpoint_every == 0 or self.step == settings.steps:
                save_checkpoint(self.engine, self.run_dir, self.step, self.stream.state(), settings.keep_checkpoints)

    def _one_step(self, batches: Iterator[GraphBatch], interval: Interval) -> None:
        asked = time.monotonic()
        micro_batches = [next(batches).to(device()) for _ in range(self.engine.gradient_accumulation_steps())]
        interval.waited += time.monotonic() - asked
        result = train_step(self.engine, self.objective, micro_batches, self.step + 1)
        self.step += 1
        interval.sums += result.sums.cpu()
        interval.loss += result.loss
        interval.steps += 1
        interval.atoms += result.atoms
        self.log.advance(self.step, result.loss)

    def _log_interval(self, interval: Interval) -> None:
        seconds = max(time.monotonic() - interval.since, 1e-9)
        # Ranks wait for each other at every step, so the share of the slowest is what the run loses.
        waited = float(sum_over_ranks(torch.tensor(interval.waited, dtype=torch.float64))) / ranks()
        norm = self.engine.get_global_grad_norm()
        self.log.train_row(
            {
                "step": self.step,
                "epoch": self.stream.epoch,
                "loss": interval.loss / interval.steps,
                "learning_rate": self.engine.get_lr()[0],
                "gradient_norm": None if norm is None else float(norm),
                "structures_per_s": float(interval.sums[:, COLUMNS.index("structures")].sum()) / seconds,
                "atoms_per_s": interval.atoms / seconds,
                "data_wait_share": waited / seconds,
                "tasks": errors_by_task(interval.sums, self.names),
            }
        )

    def _evaluate(self) -> None:
        sums = evaluate_engine(self.engine, self.objective, self.stream.settings, "val")
        self.log.evaluation_row(self.step, "val", errors_by_task(sums, self.names))


def evaluate_engine(engine: Any, objective: Objective, settings: StreamSettings, split: str) -> Tensor:
    """Return the table of sums over a split, all ranks together; each structure is counted once."""
    sums = torch.zeros(len(objective.task_weights), len(COLUMNS), dtype=torch.float64, device=device())
    batches = evaluation_batches(settings, split, rank(), ranks())
    engine.eval()
    while True:
        batch = next(batches, None)
        # A rank that has nothing left goes along with padding: under ZeRO-3 every forward needs every rank.
        busy = sum_over_ranks(torch.tensor(float(batch is not None), device=device()))
        if busy == 0:
            break
        batch = (empty_batch(settings) if batch is None else batch).to(device())
        sums += objective.sums(engine(batch), batch).detach()
    engine.train()
    return sum_over_ranks(sums)
