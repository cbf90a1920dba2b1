"""The training loop: steps, the log, evaluations, checkpoints, and when to stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydrazero.shards.errors import CheckpointError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.stream.stream import SplitReader, TrainStream
from hydrazero.trainer.checkpoint.folders import Retention, has_checkpoint
from hydrazero.trainer.checkpoint.save_load import save_checkpoint
from hydrazero.trainer.config.resume_rules import BALANCE, BEST, LOSSES, PATIENCE
from hydrazero.trainer.config.sections import TrainSection
from hydrazero.trainer.cost.step_memory import peak_memory_mb
from hydrazero.trainer.engine.engine import StepResult, train_step
from hydrazero.trainer.engine.optimizer_settings import forget_plateau
from hydrazero.trainer.engine.run_balance import RunBalance
from hydrazero.trainer.engine.schedules import Schedule
from hydrazero.trainer.engine.step_guard import StepGuard
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.engine.weight_average import WeightAverage
from hydrazero.trainer.evaluation.interval import Interval, interval_in
from hydrazero.trainer.evaluation.validation import validate
from hydrazero.trainer.ranks.distributed import (
    device,
    from_first,
    gather_objects,
    gather_to_first,
    max_over_ranks,
    sum_over_ranks,
)
from hydrazero.trainer.ranks.stop_signals import StopRequest
from hydrazero.trainer.records.identity import identity_of
from hydrazero.trainer.records.run_log import RunLog


@dataclass(kw_only=True)
class RunParts:
    """The parts of a run on one rank."""

    engine: TrainingEngine
    stream: TrainStream
    balance: RunBalance
    average: WeightAverage | None
    guard: StepGuard
    stop: StopRequest
    log: RunLog
    settings: dict[str, Any]
    """All settings of the run by key, which checkpoints hold, since a resume may change them."""


class Trainer:
    """A run on one rank, from its first step, or from a checkpoint, to its last."""

    def __init__(self, run_dir: Path, settings: TrainSection, parts: RunParts) -> None:
        self.run_dir, self.settings, self.parts, self.engine = run_dir, settings, parts, parts.engine
        self.identity = from_first(lambda: identity_of(run_dir))
        self.step = 0
        self.best: dict[str, float] | None = None
        self.stale = 0
        """Number of evaluations since the one with the lowest loss."""
        self.skipped_structures = 0
        self.skipped_before = 0
        """Number of structures that had been skipped when the run was resumed."""
        self.interval = Interval()
        self.over = False
        """Whether the last step is done, by the number of steps or by train.budget_seconds."""
        self._kinds_done: set[bool] = set()
        self.names = [task.name for task in self.engine.module.model.tasks]
        self._said_of: set[str] = set()

    def load(self, state: dict[str, Any], anew: Collection[str] = ()) -> None:
        """Continue from the state of a checkpoint; `anew` names what starts anew, since settings have changed."""
        parts = self.parts
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]
        self.skipped_before = self.skipped_structures = state["skipped_structures"]
        parts.stop.trained = state.get("trained_seconds", 0.0)  # not in checkpoints of earlier versions
        if self.settings.keep_best and self.best is not None:
            # The best checkpoint may have been damaged, or replaced by one of steps that are now done again.
            is_there = has_checkpoint(self.run_dir, int(self.best["step"]))
            self.best = self.best if gather_objects(is_there)[0] else None
        parts.guard.load(state["guard"])
        if LOSSES in anew:
            parts.guard.forget_losses()
        else:
            self.interval = interval_in(state["interval"])
        if BALANCE not in anew:
            parts.balance.load(state["balance"])
        if BEST in anew:
            self.best = None
        if PATIENCE in anew:
            self.stale = 0
            forget_plateau(self.engine, best=BEST in anew)

    def _state(self) -> dict[str, Any]:
        stream = self.parts.stream
        return {
            **self.identity,
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "skipped_structures": self._skipped(),
            "interval": self.interval.state(),
            "trained_seconds": self.parts.stop.trained,
            "stream": stream.saved_state(gather_to_first(stream.state())),
            "balance": self.parts.balance.state(),
            "guard": self.parts.guard.state(),
            "settings": self.parts.settings,
        }

    def train(self) -> None:
        """Train up to the configured number of steps, or until something stops the run, with a checkpoint at the end.

        Raises NonFiniteLossError on all ranks if too many steps in a row had to be skipped.
        """
        settings = self.settings
        self.parts.stream.stop = lambda: self.parts.stop.reason
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
                self.best = before if is_best else self.best  # evaluations and exports need a checkpoint that exists
        if self.step < settings.steps:
            self.parts.log.say(f"stopped after step {self.step}: {reason}; --resume continues from here.")

    def _say_what_is_not_compiled(self) -> None:
        for kind, why in self.engine.module.not_compiled.items():
            if kind not in self._said_of:
                self._said_of.add(kind)
                self.parts.log.say(f"compile: {kind} run eagerly, since they cannot be compiled ({why}).")

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.over

    def _timed_step(self, batches: Iterator[GraphBatch]) -> bool:
        """Do a step and count its time, except for the first step of each kind since the start, which may compile.

        Steps that measure gradients are a kind of their own. The very first step also waits for the readers.
        """
        began, kind = time.monotonic(), self.parts.balance.due(self.step + 1)
        wanted = self.one_step(batches, self.interval)
        if kind in self._kinds_done:
            self.parts.stop.trained += time.monotonic() - began
        self._kinds_done.add(kind)
        return wanted

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """Exclude the time of a pause from that of the interval."""
        start = time.monotonic()
        yield
        self.interval.since += time.monotonic() - start

    def _save(self, *, ends: bool) -> bool:
        """Save a checkpoint; return whether that was possible.

        Raise CheckpointError if it was not and the run ends here.
        """
        settings = self.settings
        retention = Retention(last=settings.keep_checkpoints, best=self.best if settings.keep_best else None)
        with self._pause():
            reason = save_checkpoint(self.engine, self.run_dir, self._state(), self.parts.average, retention)
        if reason is None:
            return True
        sentence = f"the checkpoint of step {self.step} could not be written ({reason})"
        if ends:
            raise CheckpointError(
                f"{sentence}, and the run ends here; free some disk space, then continue with --resume."
            )
        self.parts.log.say(f"warning: {sentence}; the run continues, and the last complete checkpoint is kept.")
        return False

    def _asked_to_stop(self, wanted: bool) -> str:
        """Return why a rank wants to stop here, the same on every rank, or "" if none does; set `over`."""
        stop = self.parts.stop
        asked = gather_objects((stop.reason, stop.at_the_end)) if wanted else []
        reason, at_the_end = next((each for each in asked if each[0]), ("", False))
        self.over = at_the_end or self.step == self.settings.steps
        return reason

    def _out_of_patience(self, evaluated: bool) -> str:
        """Return why the run stops after an evaluation, or "" if it continues."""
        if evaluated and self.settings.patience and self.stale >= self.settings.patience:
            return f"no evaluation of the last {self.stale} has a lower validation loss (train.patience)"
        return ""

    def one_step(self, batches: Iterator[GraphBatch], interval: Interval) -> bool:
        """Do a step; return whether a rank wants to stop after it."""
        parts = self.parts
        asked = time.monotonic()
        micro_batches = [next(batches).to(device()) for _ in range(self.engine.gradient_accumulation_steps())]
        interval.waited += time.monotonic() - asked
        interval.learning_rate = float(self.engine.get_lr()[0])  # after the step it would be that of the next step
        parts.balance.prepare(self.step + 1)
        self.engine.module.objective.weigh(self.step / self.settings.steps)
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
        interval.add(result)
        parts.log.advance(self.step, result.loss)
        return result.stop

    def _taken(self, result: StepResult) -> bool:
        """Report a step to the guard and to the log; return whether it has changed weights."""
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
        row = interval.row(self.names, self.engine.module.objective)
        norm = self.engine.get_global_grad_norm()
        self.parts.log.train_row(
            {
                "step": self.step,
                "epoch": self.parts.stream.epoch,
                **row,
                "gradient_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
                "skipped_structures": self._skipped(),
                "skipped_steps": self.parts.guard.skipped,
                "rescaled_steps": self.parts.guard.rescaled,
                "memory_mb": max_over_ranks(peak_memory_mb()),
                "weights": self.parts.balance.weights(),
            }
        )

    def _skipped(self) -> int:
        """Return how many training structures of damaged shards all ranks have skipped so far; report new ones."""
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
        """Return whether parity plots are drawn: of the 1st, 2nd, 4th, 8th, ... and the last evaluation.

        Drawing a plot of each task takes time, which this keeps small compared to that of the run.
        """
        number = -(-self.step // self.settings.evaluate_every)
        return number.bit_count() == 1 or self.over

    def _evaluate(self) -> bool:
        """Evaluate on the validation split; returns whether the loss is the lowest so far."""
        reader = SplitReader(self.parts.stream.settings, "val")
        average = self.parts.average
        with contextlib.nullcontext() if average is None else average.applied():
            found = validate(self.engine, reader, self.parts.balance.own_weights, figures=self._pictures_due())
        self._say_skipped("validation", reader.skipped)
        self.parts.log.evaluation_row(
            {"split": "val", "step": self.step, "trained_seconds": self.parts.stop.trained, **found.row()}
        )
        if found.sample is not None:
            self.parts.log.pictures(self.step, found.sample.gathered().figures)
        if found.loss is not None and isinstance(self.engine.lr_scheduler, Schedule):
            self.engine.lr_scheduler.report(found.loss)
        if found.loss is None or (self.best is not None and found.loss >= self.best["loss"]):
            self.stale += 1
            return False
        self.best, self.stale = {"step": self.step, "loss": found.loss}, 0
        return True
