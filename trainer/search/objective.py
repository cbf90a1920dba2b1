"""The objective by which trials are compared: their errors relative to those of the trivial predictor.

Let e(t, q) be the mean absolute error of quantity q (energy per atom, force components) on the validation split of task
t, and e0(t, q) that of the trivial predictor, which predicts the task's reference energies and zero forces. The error
of a trial is

    exp( mean over t of mean over q of log( e(t, q) / e0(t, q) ) ),

the geometric mean over tasks of the geometric mean over their quantities. It is 1 for a model that has learnt nothing.
A reduction by a tenth counts the same in every task, whatever its unit, size or difficulty, and a task without forces
counts as much as one with both. These do not count: quantities that a task does not predict or that have no labels in
its validation split, quantities without weight in the loss, tasks of weight 0, and structures with elements that the
task's training split does not contain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from hydrazero.models.task_facts import NONE
from hydrazero.shards.convert.references import reference_table
from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.trainer.config.sections import LossSection, TaskSection
from hydrazero.trainer.config.tasks import task_facts
from hydrazero.trainer.evaluation.errors import Mean
from hydrazero.trainer.records.run_files import read_metrics
from hydrazero.trainer.records.task_errors import TaskErrors

QUANTITIES = ("energy", "forces")
"""Quantities by whose errors trials are compared."""

SMALLEST = 1e-12
"""Smallest error in the logarithm, meV/atom or meV/Å."""

ErrorsByTask = dict[str, dict[str, float]]
"""Mean absolute errors by task and quantity, meV/atom or meV/Å."""


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """The result of a trial at a rung."""

    seconds: float
    """Seconds of training."""
    error: float
    """Value of the objective."""
    training: float
    """Structures per second in training, the median over the intervals of the log."""
    inference: float
    """Structures per second in validation (energies and forces), including reading and neighbour lists."""
    step: int
    """Number of training steps."""
    tasks: ErrorsByTask
    """Errors on the validation splits."""

    def document(self) -> dict[str, Any]:
        """Return the result as plain types for JSON."""
        return asdict(self)


def relative_error(found: Mapping[str, Mapping[str, float]], trivial: ErrorsByTask) -> float:
    """Return the objective for the errors of a validation; NaN if one of them is not finite."""
    tasks = [
        fmean(_log_ratio(found[task][quantity], error) for quantity, error in quantities.items())
        for task, quantities in trivial.items()
    ]
    return math.exp(fmean(tasks))


def _log_ratio(error: float, trivial: float) -> float:
    return math.log(max(error, SMALLEST) / trivial) if math.isfinite(error) else math.nan


def trivial_errors(
    tasks: Sequence[TaskSection], manifests: Sequence[Manifest], loss: LossSection, *, skip_damaged: bool
) -> ErrorsByTask:
    """Return the trivial predictor's errors of all tasks and quantities with a weight in the loss.

    Raise ConfigError if there are none, and ShardError for a damaged shard unless damaged shards are skipped.
    """
    found: ErrorsByTask = {}
    for task, manifest in zip(tasks, manifests, strict=True):
        facts = task_facts(task, manifest)
        wanted = {"energy": facts.has_energy, "forces": facts.has_forces and facts.forces != NONE}
        counted = {q for q, held in wanted.items() if held and (loss.weight(q) or loss.final_weight(q))}
        if not task.weight or not counted:
            continue
        means = _trivial(BlockReader(task.location, "val"), set(facts.elements), skip_damaged)
        errors = {q: mean.values(1000.0)[1] for q, mean in means.items() if q in counted}
        found[task.name] = {q: error for q, error in errors.items() if error is not None}
        if not found[task.name]:
            raise ConfigError(
                f"task '{task.name}': the validation split of {task.shards} has neither energies nor forces, by which "
                "trials are compared; convert it with a larger fraction for val, or leave the task out of the search."
            )
        for q, error in found[task.name].items():
            if error == 0:
                raise ConfigError(
                    f"task '{task.name}': the trivial predictor has no error in {q} of the validation split of "
                    f"{task.shards}, so trials cannot be compared by it; leave the task out of the search."
                )
    if not found:
        raise ConfigError("no task has energies or forces with a weight in the loss; trials are compared by these.")
    return found


def _trivial(reader: BlockReader, known: set[str], skip_damaged: bool) -> dict[str, Mean]:
    """Return the errors of a task's reference energies per atom and of zero forces on a split."""
    from ase.data import chemical_symbols

    references = reference_table(reader.manifest.reference_energies)
    means = {quantity: Mean() for quantity in QUANTITIES}
    for number in range(len(reader)):
        try:
            block = reader.read(number)
        except ShardError:
            if not skip_damaged:
                raise
            continue
        for row in range(len(block)):
            structure = block.structure(row)
            if not {chemical_symbols[z] for z in np.unique(structure.numbers)} <= known:
                continue
            if structure.energy is not None:
                reference, n = references[structure.numbers].sum(), len(structure)
                means["energy"].add(0.0, structure.energy / n, reference / n)
            if structure.forces is not None:
                means["forces"].add(0.0, structure.forces, 0.0)
    return means


def result_at(run_dir: Path, seconds: float, trivial: ErrorsByTask) -> RungResult | None:
    """Return the result of a run after `seconds` of training; None if it has not been evaluated since."""
    rows = read_metrics(run_dir)
    row = next((row for row in rows if row["kind"] == "evaluation" and row["trained_seconds"] >= seconds), None)
    if row is None:
        return None
    found: ErrorsByTask = {}
    for task, quantities in trivial.items():
        errors = TaskErrors.from_json(row["tasks"][task])
        by_quantity = {"energy": errors.energy_mae, "forces": errors.force_mae}
        found[task] = {quantity: _number(by_quantity[quantity]) for quantity in quantities}
    rates = [each["structures_per_s"] for each in rows if each["kind"] == "train" and each["step"] <= row["step"]]
    return RungResult(
        seconds=row["trained_seconds"],
        error=relative_error(found, trivial),
        training=median(rates),
        inference=row["structures_per_s"],
        step=row["step"],
        tasks=found,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
