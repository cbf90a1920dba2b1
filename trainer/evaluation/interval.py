"""Sums over the training steps between two rows of the log."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hydrazero.trainer.engine.engine import StepResult
from hydrazero.trainer.engine.losses import Objective
from hydrazero.trainer.evaluation.errors_by_task import errors_by_task
from hydrazero.trainer.ranks.distributed import max_over_ranks


@dataclass(kw_only=True)
class Interval:
    """Sums over the steps since the last row of the log."""

    sums: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Sums of errors and counts, [tasks, columns of the objective] float64, over all ranks."""
    loss: float = 0.0
    """Sum of the losses of the steps."""
    steps: int = 0
    """Number of steps that were not skipped."""
    atoms: int = 0
    """Number of atoms in their batches, over all ranks."""
    learning_rate: float = 0.0
    """Learning rate of the last step."""
    waited: float = 0.0
    """Seconds that this rank waited for data."""
    since: float = field(default_factory=time.monotonic)
    """Clock at the start of the interval, plus the duration of all evaluations and checkpoints since."""

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain types and a tensor."""
        return {**vars(self), "since": time.monotonic() - self.since}

    def add(self, result: StepResult) -> None:
        """Add a step that changed the weights."""
        self.sums = self.sums + result.sums.cpu()
        self.loss += result.loss
        self.steps += 1
        self.atoms += result.atoms

    def row(self, names: list[str], objective: Objective) -> dict[str, Any]:
        """Return the interval's part of a row of the log; it is called on every rank."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        # Ranks wait for each other at every step, so the fraction of the slowest rank is what the run loses.
        waited = max_over_ranks(self.waited)
        sums = self.sums
        if not self.steps:  # all steps were skipped
            sums = torch.zeros(len(names), objective.columns, dtype=torch.float64)
        structures = dict(zip(names, sums[:, -1].tolist(), strict=True))
        total = sum(structures.values())
        return {
            "loss": self.loss / self.steps if self.steps else None,
            "learning_rate": self.learning_rate,
            "structures_per_s": total / seconds,
            "atoms_per_s": self.atoms / seconds,
            "steps_per_s": self.steps / seconds,
            "data_wait_share": waited / seconds,
            "sampling_shares": {name: count / total if total else None for name, count in structures.items()},
            "tasks": {name: errors.to_json() for name, errors in errors_by_task(sums, names, objective).items()},
        }


def interval_in(state: dict[str, Any]) -> Interval:
    """Return an interval that continues from a state."""
    return Interval(**{**state, "since": time.monotonic() - state["since"]})
