"""Evaluation of the engine's model on a split of the data by all ranks together."""

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
    """Weighted mean loss over all tasks; None if no structure has a label."""
    structures_per_s: float
    """Structures per second of all ranks, including reading and neighbour lists."""
    tasks: dict[str, TaskErrors]
    """Losses and errors by task."""
    sample: ParitySample | None
    """A sample of the predictions for parity plots; None unless they are drawn."""

    def row(self) -> dict[str, Any]:
        """Return the evaluation's part of a row of the log."""
        tasks = {name: errors.to_json() for name, errors in self.tasks.items()}
        return {"loss": self.loss, "structures_per_s": self.structures_per_s, "tasks": tasks}


def validate(engine: TrainingEngine, reader: SplitReader, task_weights: Tensor, *, figures: bool) -> Validation:
    """Evaluate the engine's model on a reader's split by all ranks together.

    `task_weights` [tasks] are the weights of the tasks in the loss. If `figures` is set, a sample of the predictions is
    kept for parity plots. Errors in reading the data are raised on every rank.
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
    """Return the sums of errors on a reader's split over all ranks, and the number of structures left out by task.

    The sums are the objective's table [tasks, columns]; each structure is counted once. Structures with elements that
    no training structure of their task contains are left out and counted in the second tensor [tasks]. A sample of the
    predictions is kept in `sample`. Errors in reading the data are raised on every rank, whichever rank has met them.
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
    """Return this rank's next batch, or None when all ranks have no batches left.

    A rank that has no batches left while others have gets a batch of padding, since every rank must take part in the
    collective operations of each batch.
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
