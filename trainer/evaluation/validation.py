"""Passes over a split of the data with the engine's model, all ranks together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hydrazero.models.task_facts import known_elements
from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, empty_batch, evaluation_batches
from hydrazero.trainer.engine.engine import gathered_parameters
from hydrazero.trainer.engine.losses import leave_out_unseen
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.evaluation.parity_sample import ParitySample
from hydrazero.trainer.ranks.distributed import device, fail_together, rank, ranks, sum_over_ranks


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
