"""What trials are compared by: how much of the trivial predictor's error a model leaves, over all tasks alike.

With e(t, q) the mean absolute error of quantity q (energy per atom, force components) on the validation split of task
t, and e0(t, q) that of the trivial predictor, which knows the task's reference energies by element and says that all
forces are zero, the error of a trial is

    exp( mean over t of mean over q of log( e(t, q) / e0(t, q) ) ),

the geometric mean over tasks of the geometric mean over their quantities: 1 for a model that has learnt nothing, and
a tenth less in any task counts the same, whatever its unit, size or difficulty. A task without forces counts as much as
one with both. Left out are what a task does not predict or has no labels of in the validation split, what has no weight
in the loss, tasks of weight 0, and structures with elements that the task's training split does not hold.
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
"""Quantities whose errors trials are compared by."""

SMALLEST = 1e-12
"""meV; an error of zero has no logarithm."""

ErrorsByTask = dict[str, dict[str, float]]
"""Task -> quantity -> mean absolute error, meV/atom or meV/Å."""


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """What a trial has come to at a rung."""

    seconds: float
    """Of training."""
    error: float
    """The objective."""
    training: float
    """Structures/s in training steps, the median of the log's intervals."""
    inference: float
    """Structures/s in the validation, energies and forces, reading and neighbour lists included."""
    step: int
    tasks: ErrorsByTask

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def relative_error(found: Mapping[str, Mapping[str, float]], trivial: ErrorsByTask) -> float:
    """Return the objective of the errors of a validation; NaN if one of them is not finite."""
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
    """Return the trivial predictor's errors of everything that counts in the loss.

    Raises ConfigError if nothing counts, and ShardError for a damaged shard unless these are skipped.
    """
    found: ErrorsByTask = {}
    for task, manifest in zip(tasks, manifests, strict=True):
        facts = task_facts(task, manifest)
        wanted = {"energy": facts.has_energy, "forces": facts.has_forces and facts.forces != NONE}
        counted = {q for q, held in wanted.items() if held and (loss.weight(q) or loss.final_weight(q))}
        if not task.weight or not counted:
            continue
        means = _trivial(BlockReader(task.shards, "val"), set(facts.elements), skip_damaged)
        errors = {q: mean.values(1000.0)[1] for q, mean in means.items() if q in counted}
        found[task.name] = {q: error for q, error in errors.items() if error is not None}
        if not found[task.name]:
            raise ConfigError(
                f"task '{task.name}': the validation split of {task.shards} has neither energies nor forces, by which "
                "trials are compared; convert it with a larger share for val, or leave the task out of the search."
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
    """Sum up the errors of a task's reference energies per atom, and of zero forces, over a split."""
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
    """Return what a run has come to after so many seconds of training; None if it has not been evaluated there yet."""
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
