"""Errors by task from the sums that training steps and evaluations add up."""

from __future__ import annotations

from torch import Tensor

from hydrazero.trainer.engine.losses import Objective
from hydrazero.trainer.records.task_errors import TaskErrors


def errors_by_task(sums: Tensor, names: list[str], objective: Objective) -> dict[str, TaskErrors]:
    """Return mean absolute errors by task from a table of sums over all ranks; None where a task has no such label.

    `sums` [tasks, columns of the objective] has one row for each of the `names`.
    """
    found: dict[str, TaskErrors] = {}
    for name, row in zip(names, sums.tolist(), strict=True):
        loss: dict[str, float | None] = {}
        mean: dict[str, float | None] = {}
        for index, quantity in enumerate(objective.quantities):
            total, count, absolute = row[3 * index : 3 * index + 3]
            loss[quantity] = total / count if count else None
            mean[quantity] = absolute / count if count else None
        found[name] = TaskErrors(
            structures=int(row[-1]),
            energy_mae=_thousand(mean.pop("energy", None)),
            force_mae=_thousand(mean.pop("forces", None)),
            stress_mae=_thousand(mean.pop("stress", None)),
            mean_energy_spread=_thousand(mean.pop("spread", None)),
            target_maes=mean,
            energy_loss=loss["energy"],
            forces_loss=loss["forces"],
        )
    return found


def _thousand(value: float | None) -> float | None:
    """Return a value in thousandths of its unit."""
    return None if value is None else 1000.0 * value
