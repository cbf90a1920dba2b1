"""Program of each rank in test_balance.py: gradients of three tasks on one or two ranks with different structures."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_balance import labelled_batch, trained_model

from hydrazero.trainer.balance import BalanceFacts, BalanceSection
from hydrazero.trainer.engine.run_balance import RunBalance
from hydrazero.trainer.ranks.distributed import rank, ranks, start_ranks, stop_ranks, sum_over_ranks
from hydrazero.trainer.ranks.exit_status import exit_rank


def main(folder: Path) -> None:
    start_ranks()
    trained = trained_model()
    balance = RunBalance(BalanceSection(method="gradnorm", every=1), BalanceFacts(structures=(1, 1, 1)), trained)
    batches = [labelled_batch(0), labelled_batch(1)]
    for batch in batches:  # only the first batch has labels of task 2
        known = batch.task != 2 if batch is batches[1] else torch.ones_like(batch.task, dtype=torch.bool)
        batch.energy_mask = batch.energy_mask & known
        batch.forces_mask = batch.forces_mask & known[batch.structure]
    mine = batches[rank() :: ranks()]
    objective = trained.objective
    counts = sum_over_ranks(torch.stack([objective.counts(batch) for batch in mine]).sum(0))
    balance.prepare(1)
    table = 0
    for batch in mine:
        loss, sums = trained(batch, counts)
        (loss * ranks()).backward()
        table = table + sums
    row = balance.update(1, objective.by_task(sum_over_ranks(table), counts))
    torch.save(
        {"norms": row["gradient_norms"], "cosines": row["cosines"], "weights": row["weights"]},
        folder / f"{rank()}-of-{ranks()}",
    )
    stop_ranks()
    exit_rank(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
