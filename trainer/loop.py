"""The training loop: batches in, steps, what is logged, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydrazero.models.task_facts import known_elements
from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.graph import GraphBatch
from hydrazero.shards.stream import SplitReader, StreamSettings, TrainStream, empty_batch, evaluation_batches
from hydrazero.trainer.balancing import RunBalance
from hydrazero.trainer.checkpoint import save_checkpoint
from hydrazero.trainer.config import RunConfig
from hydrazero.trainer.console import RunLog
from hydrazero.trainer.distributed import (
    device,
    fail_together,
    gather_objects,
    max_over_ranks,
    rank,
    ranks,
    sum_over_ranks,
)
from hydrazero.trainer.engine import train_step
from hydrazero.trainer.losses import errors_by_task, leave_out_unseen


@dataclass(kw_only=True)
class Interval:
    """What has gathered since the last line of the log."""

    sums: Tensor
    loss: float = 0.0
    steps: int = 0
    atoms: int = 0
    learning_rate: float = 0.0
    """Of its last step."""
    waited: float = 0.0
    """Seconds that this rank stood still for data."""
    since: float = 0.0
    """Clock at its start, later by every pause for an evaluation or a checkpoint."""


def new_interval() -> Interval:
    """Return an empty interval that starts now."""
    return Interval(sums=torch.zeros((), dtype=torch.float64), since=time.monotonic())


class Trainer:
    """A run in progress on one rank."""

    def __init__(
        self, config: RunConfig, engine: Any, stream: TrainStream, balance: RunBalance, log: RunLog, start: int
    ) -> None:
        self.config, self.engine, self.stream, self.balance, self.log = config, engine, stream, balance, log
        self.step = start
        self.skipped = 0
        self.run_dir = Path(config.run.out)
        self.names = [task.name for task in engine.module.model.tasks]

    def train(self) -> None:
        """Train up to the configured number of steps, with a checkpoint at the end."""
        settings = self.config.train
        batches = iter(self.stream)
        interval = new_interval()
        self.engine.train()
        while self.step < settings.steps:
            self._one_step(batches, interval)
            if self._due(settings.log_every):
                self._log_interval(interval)
                interval = new_interval()
            paused = time.monotonic()
            if self._due(settings.evaluate_every):
                self._evaluate()
            if self._due(settings.checkpoint_every):
                self._save()
            interval.since += time.monotonic() - paused

    def _save(self) -> None:
        place = {"step": self.step, "stream": self.stream.saved_state(gather_objects(self.stream.state()))}
        state = {**place, "balance": self.balance.state()}
        save_checkpoint(self.engine, self.run_dir, state, self.config.train.keep_checkpoints)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def _one_step(self, batches: Iterator[GraphBatch], interval: Interval) -> None:
        asked = time.monotonic()
        micro_batches = [next(batches).to(device()) for _ in range(self.engine.gradient_accumulation_steps())]
        interval.waited += time.monotonic() - asked
        interval.learning_rate = float(self.engine.get_lr()[0])  # after the step it is that of the next one
        self.balance.prepare(self.step + 1)
        result = train_step(self.engine, micro_batches, self.step + 1)
        self.step += 1
        if (measured := self.balance.update(self.step, result.losses)) is not None:
            self.log.balance_row(measured)
        interval.sums = interval.sums + result.sums.cpu()
        interval.loss += result.loss
        interval.steps += 1
        interval.atoms += result.atoms
        self.log.advance(self.step, result.loss)

    def _log_interval(self, interval: Interval) -> None:
        seconds = max(time.monotonic() - interval.since, 1e-9)
        # Ranks wait for each other at every step, so the share of the slowest is what the run loses.
        waited = max_over_ranks(interval.waited)
        norm = self.engine.get_global_grad_norm()
        self.log.train_row(
            {
                "step": self.step,
                "epoch": self.stream.epoch,
                "loss": interval.loss / interval.steps,
                "learning_rate": interval.learning_rate,
                "gradient_norm": None if norm is None else float(norm),
                "structures_per_s": float(interval.sums[:, -1].sum()) / seconds,
                "atoms_per_s": interval.atoms / seconds,
                "steps_per_s": interval.steps / seconds,
                "data_wait_share": waited / seconds,
                "skipped_structures": self._skipped(),
                "weights": self.balance.weights(),
                "tasks": errors_by_task(interval.sums, self.names, self.engine.module.objective),
            }
        )

    def _skipped(self) -> int:
        """Training structures that damaged shards have cost so far, on all ranks; what is new is said."""
        total = int(sum_over_ranks(torch.tensor([self.stream.skipped.total()], dtype=torch.float64)))
        if total > self.skipped:
            self.skipped = total
            self._say_skipped("training", self.stream.skipped)
        return total

    def _say_skipped(self, split: str, here: Counter[str]) -> None:
        everywhere: Counter[str] = Counter()
        for counts in gather_objects(dict(here)):
            everywhere.update(counts)
        for reason, count in sorted(everywhere.items()):
            self.log.say(f"warning: {count:,} {split} structures are skipped so far: {reason}")

    def _evaluate(self) -> None:
        reader = SplitReader(self.stream.settings, "val")
        sums, unseen = evaluate_engine(self.engine, reader)
        self._say_skipped("validation", reader.skipped)
        tasks = errors_by_task(sums, self.names, self.engine.module.objective)
        for name, count in zip(self.names, unseen.tolist(), strict=True):
            tasks[name]["unseen"] = int(count)
        self.log.evaluation_row(self.step, "val", tasks)


def evaluate_engine(engine: Any, reader: SplitReader) -> tuple[Tensor, Tensor]:
    """Return the table of sums over a reader's split, all ranks together; each structure is counted once.

    Structures with elements that no training structure of their task holds are left out; the second tensor [tasks]
    counts them. Raises what the data raise, on every rank, whichever has met it.
    """
    model = engine.module.model
    known = known_elements(model.tasks).to(device())
    sums = torch.zeros(len(model.tasks), engine.module.objective.columns, dtype=torch.float64, device=device())
    unseen = torch.zeros(len(model.tasks), dtype=torch.float64, device=device())
    batches = evaluation_batches(reader, rank(), ranks())
    engine.eval()
    while (batch := _next_on_any_rank(batches, reader.settings)) is not None:
        batch = batch.to(device())
        unseen += leave_out_unseen(batch, model, known)
        sums += engine.module.evaluate(batch)
    engine.train()
    return sum_over_ranks(sums), sum_over_ranks(unseen)


def _next_on_any_rank(batches: Iterator[GraphBatch], settings: StreamSettings) -> GraphBatch | None:
    """Return this rank's next batch, padding if it has nothing left while others have, None when all are done.

    Every rank goes along to the end: under ZeRO-3 every forward needs every rank.
    """
    batch, error = None, None
    try:
        batch = next(batches, None)
    except HydrazeroError as met:
        error = met
    busy, failed = sum_over_ranks(torch.tensor([batch is not None, error is not None], dtype=torch.float64)).tolist()
    if failed:
        fail_together(error)
    if not busy:
        return None
    return empty_batch(settings) if batch is None else batch
