"""The training loop: batches in, steps, what is logged, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.errors import CheckpointError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.stream.stream import SplitReader, TrainStream
from hydrazero.trainer.checkpoint.folders import Retention, is_kept
from hydrazero.trainer.checkpoint.save_load import save_checkpoint
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.cost.step_memory import peak_memory_mb
from hydrazero.trainer.engine.engine import StepResult, train_step
from hydrazero.trainer.engine.losses import errors_by_task
from hydrazero.trainer.engine.run_balance import RunBalance
from hydrazero.trainer.engine.schedules import Schedule
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.evaluation.parity_sample import ParitySample
from hydrazero.trainer.evaluation.validation import evaluate_engine
from hydrazero.trainer.ranks.distributed import device, gather_objects, gather_to_first, max_over_ranks, sum_over_ranks
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.run_log import RunLog


@dataclass(kw_only=True)
class Interval:
    """What has gathered since the last line of the log."""

    sums: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    loss: float = 0.0
    steps: int = 0
    atoms: int = 0
    learning_rate: float = 0.0
    """Of its last step."""
    waited: float = 0.0
    """Seconds that this rank stood still for data."""
    since: float = field(default_factory=time.monotonic)
    """Clock at its start, later by every pause for an evaluation or a checkpoint."""

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain types and a tensor."""
        return {**vars(self), "since": time.monotonic() - self.since}


def interval_in(state: dict[str, Any]) -> Interval:
    """Return an interval that goes on from a state."""
    return Interval(**{**state, "since": time.monotonic() - state["since"]})


@dataclass(kw_only=True)
class RunParts:
    """What a run in progress on one rank is made of."""

    engine: TrainingEngine
    stream: TrainStream
    balance: RunBalance
    average: WeightAverage | None
    guard: StepGuard
    stop: StopRequest
    log: RunLog


class Trainer:
    """A run in progress on one rank."""

    def __init__(self, config: RunConfig, parts: RunParts) -> None:
        self.config, self.parts, self.engine = config, parts, parts.engine
        self.step = 0
        self.best: dict[str, float] | None = None
        self.stale = 0
        """Evaluations since the best one."""
        self.skipped_structures = 0
        self.skipped_before = 0
        """Structures that had been skipped when the run was resumed."""
        self.interval = Interval()
        self.over = False
        """Whether the last step has been done, by their number or by train.budget_seconds."""
        self._kinds_done: set[bool] = set()
        self.run_dir = Path(config.run.out)
        self.names = [task.name for task in self.engine.module.model.tasks]
        self._said_of: set[str] = set()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]
        self.skipped_before = self.skipped_structures = state["skipped_structures"]
        self.interval = interval_in(state["interval"])
        self.parts.stop.trained = state.get("trained_seconds", 0.0)  # not in checkpoints of earlier versions
        # Its checkpoint may have been damaged, or have made way for one of steps that are done again.
        is_there = self.best is not None and is_kept(self.run_dir, int(self.best["step"]))
        self.best = self.best if gather_objects(is_there)[0] else None
        if (sentence := self.parts.balance.load(state["balance"])) is not None:
            self.parts.log.say(sentence)
        self.parts.guard.load(state["guard"])

    def _state(self) -> dict[str, Any]:
        stream = self.parts.stream
        return {
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "skipped_structures": self._skipped(),
            "interval": self.interval.state(),
            "trained_seconds": self.parts.stop.trained,
            "stream": stream.saved_state(gather_to_first(stream.state())),
            "balance": self.parts.balance.state(),
            "guard": self.parts.guard.state(),
        }

    def train(self) -> None:
        """Train up to the configured number of steps, or until something stops the run, with a checkpoint at the end.

        Raises NonFiniteLossError on all ranks if too many steps in a row had to be skipped.
        """
        settings = self.config.train
        batches = iter(self.parts.stream)
        self.engine.train()
        reason = ""
        while self.step < settings.steps and not reason:
            reason = self._asked_to_stop(self._timed_step(batches))
            if self._due(settings.log_every):
                self._log_interval(self.interval)
                self.interval = Interval()
            evaluated, before = self._due(settings.evaluate_every), self.best
            with self._pause():
                is_best = evaluated and self._evaluate() and settings.keep_best
            self._say_what_is_not_compiled()
            reason = reason or self._out_of_patience(evaluated)
            ends = bool(reason) or self.over
            if (self._due(settings.checkpoint_every) or is_best or ends) and not self._save(ends=ends):
                self.best = before if is_best else self.best  # it must be there to be evaluated and exported
        if self.step < settings.steps:
            self.parts.log.say(f"stopped after step {self.step}: {reason}; --resume goes on from here.")

    def _say_what_is_not_compiled(self) -> None:
        for kind, why in self.engine.module.not_compiled.items():
            if kind not in self._said_of:
                self._said_of.add(kind)
                self.parts.log.say(f"compile: {kind} run eagerly, since they cannot be compiled ({why}).")

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.over

    def _timed_step(self, batches: Iterator[GraphBatch]) -> bool:
        """Do a step and count its time, but not of the first of a kind since the start, which may compile.

        Those that measure gradients are a kind of their own; the very first waits for readers too.
        """
        began, kind = time.monotonic(), self.parts.balance.due(self.step + 1)
        wanted = self.one_step(batches, self.interval)
        if kind in self._kinds_done:
            self.parts.stop.trained += time.monotonic() - began
        self._kinds_done.add(kind)
        return wanted

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """Leave what happens meanwhile out of the interval's time."""
        start = time.monotonic()
        yield
        self.interval.since += time.monotonic() - start

    def _save(self, *, ends: bool) -> bool:
        """Save a checkpoint; returns whether it was possible. Raises CheckpointError if not, and the run ends here."""
        settings = self.config.train
        retention = Retention(last=settings.keep_checkpoints, best=self.best if settings.keep_best else None)
        with self._pause():
            reason = save_checkpoint(self.engine, self.run_dir, self._state(), self.parts.average, retention)
        if reason is None:
            return True
        sentence = f"the checkpoint of step {self.step} could not be written ({reason})"
        if ends:
            raise CheckpointError(f"{sentence}, and the run ends here; make room, then --resume goes on.")
        self.parts.log.say(f"warning: {sentence}; the run goes on, the last complete one stays.")
        return False

    def _asked_to_stop(self, wanted: bool) -> str:
        """Why a rank wants to stop here, the same on every rank; empty if none does. Notes whether the run is over."""
        stop = self.parts.stop
        asked = gather_objects((stop.reason, stop.at_the_end)) if wanted else []
        reason, at_the_end = next((each for each in asked if each[0]), ("", False))
        self.over = at_the_end or self.step == self.config.train.steps
        return reason

    def _out_of_patience(self, evaluated: bool) -> str:
        """Why the run stops after an evaluation; empty if it goes on."""
        if evaluated and self.config.train.patience and self.stale >= self.config.train.patience:
            return f"no evaluation of the last {self.stale} has a lower validation loss (train.patience)"
        return ""

    def one_step(self, batches: Iterator[GraphBatch], interval: Interval) -> bool:
        """Do a step; returns whether a rank wants to stop after it."""
        parts = self.parts
        asked = time.monotonic()
        micro_batches = [next(batches).to(device()) for _ in range(self.engine.gradient_accumulation_steps())]
        interval.waited += time.monotonic() - asked
        interval.learning_rate = float(self.engine.get_lr()[0])  # after the step it is that of the next one
        parts.balance.prepare(self.step + 1)
        self.engine.module.objective.weigh(self.step / self.config.train.steps)
        result = train_step(self.engine, micro_batches, parts.guard, stop=parts.stop.wanted())
        self.step += 1
        measured = parts.balance.update(self.step, result.losses)
        taken = self._taken(result)
        parts.guard.shift(parts.balance.shift)
        if not taken:
            return result.stop
        if parts.average is not None:
            parts.average.update()
        if measured is not None:
            parts.log.balance_row(measured)
        interval.sums = interval.sums + result.sums.cpu()
        interval.loss += result.loss
        interval.steps += 1
        interval.atoms += result.atoms
        parts.log.advance(self.step, result.loss)
        return result.stop

    def _taken(self, result: StepResult) -> bool:
        """Tell the guard, and the log, how a step went; returns whether it has changed weights."""
        guard, log = self.parts.guard, self.parts.log
        if result.rescaled:
            if (sentence := guard.rescale(self.step)) is not None:
                log.say(sentence)
        elif result.skipped:
            log.say(guard.skip(self.step, result.loss, result.suspects))
        else:
            guard.done(result.loss)
        return not (result.rescaled or result.skipped)

    def _log_interval(self, interval: Interval) -> None:
        seconds = max(time.monotonic() - interval.since, 1e-9)
        # Ranks wait for each other at every step, so the share of the slowest is what the run loses.
        waited = max_over_ranks(interval.waited)
        norm = self.engine.get_global_grad_norm()
        if not interval.steps:  # all skipped
            interval.sums = torch.zeros(len(self.names), self.engine.module.objective.columns, dtype=torch.float64)
        self.parts.log.train_row(
            {
                "step": self.step,
                "epoch": self.parts.stream.epoch,
                "loss": interval.loss / interval.steps if interval.steps else None,
                "learning_rate": interval.learning_rate,
                "gradient_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
                "structures_per_s": float(interval.sums[:, -1].sum()) / seconds,
                "atoms_per_s": interval.atoms / seconds,
                "steps_per_s": interval.steps / seconds,
                "data_wait_share": waited / seconds,
                "skipped_structures": self._skipped(),
                "skipped_steps": self.parts.guard.skipped,
                "rescaled_steps": self.parts.guard.rescaled,
                "memory_mb": max_over_ranks(peak_memory_mb()),
                "weights": self.parts.balance.weights(),
                "sampling_shares": self._shares(interval.sums[:, -1]),
                "tasks": errors_by_task(interval.sums, self.names, self.engine.module.objective),
            }
        )

    def _shares(self, structures: Tensor) -> dict[str, float | None]:
        """Share of each task among the structures drawn, [tasks] of them."""
        total = float(structures.sum())
        return {name: n / total if total else None for name, n in zip(self.names, structures.tolist(), strict=True)}

    def _skipped(self) -> int:
        """Training structures that damaged shards have cost so far, on all ranks; what is new is said."""
        skipped = self.parts.stream.skipped
        total = self.skipped_before + int(sum_over_ranks(torch.tensor([skipped.total()], dtype=torch.float64)))
        if total > self.skipped_structures:
            self.skipped_structures = total
            self._say_skipped("training", skipped)
        return total

    def _say_skipped(self, split: str, here: Counter[str]) -> None:
        everywhere: Counter[str] = Counter()
        for counts in gather_objects(dict(here)):
            everywhere.update(counts)
        for reason, count in sorted(everywhere.items()):
            self.parts.log.say(f"warning: {count:,} {split} structures are skipped so far: {reason}")

    def _pictures_due(self) -> bool:
        """Whether predictions of an evaluation are drawn: of the 1st, 2nd, 4th, 8th, ... and the last.

        A picture of each task takes its time, which so stays small beside that of the run.
        """
        number = -(-self.step // self.config.train.evaluate_every)
        return number.bit_count() == 1 or self.over

    def _evaluate(self) -> bool:
        """Evaluate on the validation split; returns whether it is the best so far."""
        reader = SplitReader(self.parts.stream.settings, "val")
        average = self.parts.average
        with contextlib.nullcontext() if average is None else average.applied():
            sample = ParitySample(self.names, self.engine.module.objective) if self._pictures_due() else None
            began = time.monotonic()
            sums, unseen = evaluate_engine(self.engine, reader, sample)
            seconds = max_over_ranks(time.monotonic() - began)
        self._say_skipped("validation", reader.skipped)
        objective = self.engine.module.objective
        score = objective.score(sums, self.parts.balance.own_weights)
        tasks = errors_by_task(sums, self.names, objective)
        for name, count in zip(self.names, unseen.tolist(), strict=True):
            tasks[name]["unseen"] = int(count)
        self.parts.log.evaluation_row(
            {
                "split": "val",
                "step": self.step,
                "loss": None if math.isnan(score) else score,
                "trained_seconds": self.parts.stop.trained,
                "structures_per_s": float(sums[:, -1].sum()) / seconds,
                "tasks": tasks,
            }
        )
        if sample is not None:
            self.parts.log.pictures(self.step, sample.gathered().figures)
        if isinstance(self.engine.lr_scheduler, Schedule) and not math.isnan(score):
            self.engine.lr_scheduler.report(score)
        if math.isnan(score) or (self.best is not None and score >= self.best["loss"]):
            self.stale += 1
            return False
        self.best, self.stale = {"step": self.step, "loss": score}, 0
        return True
