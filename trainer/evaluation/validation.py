"""Passes over a split of the data with the engine's model, all ranks together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hydrazero.models.task_facts import known_elements
from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, empty_batch, evaluation_batches
from hydrazero.trainer.engine.engine import gathered_parameters
from hydrazero.trainer.engine.losses import leave_out_unseen
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.evaluation.errors_by_task import errors_by_task
from hydrazero.trainer.evaluation.parity_sample import ParitySample
from hydrazero.trainer.ranks.distributed import device, fail_together, max_over_ranks, rank, ranks, sum_over_ranks
from hydrazero.trainer.records.task_errors import TaskErrors


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The result of an evaluation of the engine's model."""

    loss: float | None
    """Weighted loss over all tasks; None if no structure has a label."""
    structures_per_s: float
    """Structures per second of all ranks, reading and neighbour lists included."""
    tasks: dict[str, TaskErrors]
    """Losses and errors by task, with the number of structures that were left out because of their elements."""
    sample: ParitySample | None
    """Some of the predictions, for parity plots."""

    def row(self) -> dict[str, Any]:
        """Return the evaluation's part of a row of the log."""
        tasks = {name: errors.to_json() for name, errors in self.tasks.items()}
        return {"loss": self.loss, "structures_per_s": self.structures_per_s, "tasks": tasks}


def validate(engine: TrainingEngine, reader: SplitReader, task_weights: Tensor, *, figures: bool) -> Validation:
    """Evaluate the engine's model on a reader's split, all ranks together; `task_weights` [tasks] weigh its loss.

    Some predictions are kept for parity plots if `figures` is set. Raises what reading the data raises, on every rank.
    """
    objective = engine.module.objective
    names = [task.name for task in engine.module.model.tasks]
    sample = ParitySample(names, objective) if figures else None
    began = time.monotonic()
    sums, unseen = evaluate_engine(engine, reader, sample)
    seconds = max_over_ranks(time.monotonic() - began)
    loss = objective.score(sums, task_weights)
    errors = errors_by_task(sums, names, objective)
    tasks = {name: replace(errors[name], unseen=int(count)) for name, count in zip(names, unseen.tolist(), strict=True)}
    return Validation(
        loss=None if math.isnan(loss) else loss,
        structures_per_s=float(sums[:, -1].sum()) / seconds,
        tasks=tasks,
        sample=sample,
    )


def evaluate_engine(
    engine: TrainingEngine, reader: SplitReader, sample: ParitySample | None = None
) -> tuple[Tensor, Tensor]:
    """Return the table of sums over a reader's split, all ranks together; each structure is counted once.

    Structures with elements that no training structure of their task holds are left out; the second tensor [tasks]
    counts them. Some predictions are kept in `sample`. Raises what the data raise, on every rank, whichever has met it.
    """
    model = engine.module.model
    known = known_elements(model.tasks).to(device())
    sums = torch.zeros(len(model.tasks), engine.module.objective.columns, dtype=torch.float64, device=device())
    unseen = torch.zeros(len(model.tasks), dtype=torch.float64, device=device())
    batches = evaluation_batches(reader, rank(), ranks())
    engine.eval()
    with gathered_parameters(engine):
        while (batch := next_on_any_rank(batches, reader.settings)) is not None:
            batch = batch.to(device())
            unseen += leave_out_unseen(batch, model, known)
            predictions = engine.module.predict(batch)
            sums += engine.module.objective.sums(predictions, batch).detach()
            if sample is not None:
                sample.add(batch, predictions)
    engine.train()
    return sum_over_ranks(sums), sum_over_ranks(unseen)


def next_on_any_rank(batches: Iterator[GraphBatch], settings: StreamSettings) -> GraphBatch | None:
    """Return this rank's next batch, padding if it has nothing left while others have, None when all are done.

    Every rank goes along to the end.
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
