"""The content of a run folder that reports show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ase.data import chemical_symbols
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError, HydrazeroError
from hydrazero.trainer.plots.parity import Array, OtherParity, Parity
from hydrazero.trainer.records.run_files import (
    EVALUATION_NAME,
    METRICS_NAME,
    PREDICTIONS,
    RUN_NAME,
    read_metrics,
    read_run_json,
)
from hydrazero.trainer.records.task_errors import KEYS, Evaluation, TargetErrors, read_evaluation

LARGEST = 1e100
"""Largest number of a row of metrics.jsonl, apart from infinity: axes of plots do not reach farther."""
AGAIN = "run 'hydrazero evaluate' again"


@dataclass(frozen=True, kw_only=True)
class TaskPredictions(Parity):
    """Labels and predictions of one task's evaluated structures."""

    atoms: Array
    """Number of atoms of each structure, [structures]."""
    energy_spread: Array
    """Spread of the ensemble's energies, eV per atom, [structures]; NaN without an ensemble."""
    force_atoms: Array
    """Number of atoms in the structure of each atom that has forces, [atoms]."""
    force_numbers: NDArray[np.int64]
    """Atomic number of each atom that has forces, [atoms]."""
    others: dict[str, OtherParity] = field(default_factory=dict)
    """Stress, under 'stress', and targets, by name."""

    @property
    def force_error_by_element(self) -> dict[str, float]:
        """Return the mean absolute error of force components by element, meV/Å."""
        errors = 1000 * np.abs(self.forces_predicted - self.forces).reshape(-1, 3)
        return {
            chemical_symbols[number]: float(np.nanmean(errors[self.force_numbers == number]))
            for number in np.unique(self.force_numbers)
        }


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The content of a run folder."""

    path: Path
    """Run folder."""
    label: str
    """Name of the run in the report."""
    record: dict[str, Any]
    """Content of run.json."""
    metrics: list[dict[str, Any]]
    """Rows of metrics.jsonl."""
    evaluation: Evaluation | None = None
    """Content of evaluation.json; None if the run has not been evaluated."""
    predictions: dict[str, TaskPredictions] = field(default_factory=dict)
    """Predictions of the evaluation, by task."""
    no_errors: str = ""
    """Why the run's evaluation is left out, if it has one that is not of the run's model as it is now."""

    @property
    def tasks(self) -> list[str]:
        """Return the names of the run's tasks."""
        return [task["name"] for task in self.record["tasks"]]

    @property
    def step(self) -> int:
        """Return the last step that was logged."""
        return max((row["step"] for row in self.metrics), default=0)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl of one kind: 'train', 'evaluation' or 'balance'."""
        return [row for row in self.metrics if row["kind"] == kind]

    def series(self, kind: str, *keys: str) -> tuple[list[int], list[float]]:
        """Return steps and values under nested keys of the rows of a kind; steps without a value are left out."""
        steps, values = [], []
        for row in self.rows(kind):
            value: Any = row
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                steps.append(row["step"])
                values.append(self._number(value, row, keys))
        return steps, values

    def matrix(self, row: Mapping[str, Any], key: str) -> Array:
        """Return the numbers of all pairs of tasks, [tasks, tasks], under a key of a row; NaN where there is none."""
        lines, tasks = row.get(key), len(self.tasks)
        square = isinstance(lines, list) and all(isinstance(line, list) and len(line) == tasks for line in lines)
        if not isinstance(lines, list) or not square or len(lines) != tasks:
            raise self._misused(f"has no table of {tasks} x {tasks} numbers", row, [key])
        return np.array(
            [[math.nan if value is None else self._number(value, row, [key]) for value in line] for line in lines]
        )

    def _number(self, value: Any, row: Mapping[str, Any], keys: Sequence[str]) -> float:
        if not isinstance(value, int | float) or LARGEST < abs(value) != math.inf:
            raise self._misused("is not a number that can be drawn", row, keys)
        return float(value)

    def _misused(self, what: str, row: Mapping[str, Any], keys: Sequence[str]) -> ConfigError:
        name = f"{'.'.join(keys)} of step {row['step']} ({row['kind']})"
        return ConfigError(f"{self.path / METRICS_NAME}: {name} {what}; remove that line.")

    def error_series(self, kind: str, task: str, error: str) -> tuple[list[int], list[float]]:
        """Return steps and values of one of a task's errors, an attribute of `TaskErrors` such as 'energy_mae'."""
        return self.series(kind, "tasks", task, KEYS[error])


def tasks_of(runs: Sequence[RunData]) -> list[str]:
    """Return the names of all tasks of the runs, in order of their first occurrence."""
    return list(dict.fromkeys(name for run in runs for name in run.tasks))


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Return a distinct name for each run: that of its folder, with as many parent folders as needed."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(len(each) for each in parts) + 1):
        labels = ["/".join(each[-depth:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ConfigError(f"{folders[0]} is named twice; name different runs.")


def read_run(run_dir: Path, label: str) -> RunData:
    """Read a run folder; raise ConfigError that names the file if one is missing or damaged."""
    run = RunData(path=run_dir, label=label, record=read_run_json(run_dir, RUN_NAME), metrics=read_metrics(run_dir))
    if not (run_dir / EVALUATION_NAME).is_file():
        return run
    evaluation = read_evaluation(run_dir / EVALUATION_NAME)
    if reason := _of_other_weights(evaluation, run_dir):
        return replace(run, no_errors=reason)
    predictions = {
        name: read_predictions(run_dir / PREDICTIONS / f"{name}.parquet", task.targets)
        for name, task in evaluation.tasks.items()
    }
    return replace(run, evaluation=evaluation, predictions=predictions)


def _of_other_weights(evaluation: Evaluation, run_dir: Path) -> str:
    """Return a sentence if an evaluation has not measured the model that the run has now, else "".

    Evaluations of early versions do not record what they have measured, and a folder may be without its checkpoints;
    then nothing can be compared.
    """
    from hydrazero.trainer.checkpoint.folders import checkpoint_named, checkpoints, step_of
    from hydrazero.trainer.checkpoint.model_of_run import model_of_run
    from hydrazero.trainer.evaluation.export import is_of

    if (evaluation.weights is None and evaluation.step is None) or not checkpoints(run_dir):
        return ""
    try:
        best = step_of(checkpoint_named(run_dir, "best"))
        if evaluation.step in (None, best) and is_of(evaluation, model_of_run(run_dir, str(best)), run_dir):
            return ""
    except (HydrazeroError, OSError) as error:
        return f"Its evaluation is left out, since it cannot be compared with the run's best checkpoint: {error}"
    of = "other weights" if evaluation.step in (None, best) else f"the checkpoint of step {evaluation.step}"
    return f"Its last evaluation is of {of}, and is left out: the run's best checkpoint is now of step {best}."


def read_predictions(path: Path, targets: Mapping[str, TargetErrors]) -> TaskPredictions:
    """Read one task's predictions, with the errors of its `targets`, which state their units.

    Raise ConfigError if the file is missing or damaged.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        return _predictions(pq.read_table(path).combine_chunks(), targets)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = f"it lacks the column {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"{path} cannot be read ({reason}); {AGAIN}.") from error


def _predictions(table: pa.Table, targets: Mapping[str, TargetErrors]) -> TaskPredictions:
    """Return the predictions in a table; raise KeyError, ValueError or ArrowException for a table of another form."""
    atoms = _numbers(pc.list_value_length(table.column("numbers")))
    reference = _numbers(table.column("reference_energy"))
    forced = table.filter(pc.is_valid(table.column("forces")))
    force_numbers = _flat(forced, "numbers").astype(np.int64)
    sizes = _numbers(pc.list_value_length(forced.column("numbers"))).astype(np.int64)
    forces, predicted = (_vectors(forced, name, len(force_numbers)) for name in ("forces", "forces_predicted"))
    if len(force_numbers) and not 1 <= force_numbers.min() <= force_numbers.max() < len(chemical_symbols):
        raise ValueError("a number in 'numbers' is not that of an element")
    others = {"stress": "eV/Å³", **{name: errors.unit for name, errors in targets.items()}}
    return TaskPredictions(
        energy=(_numbers(table.column("energy")) - reference) / atoms,
        energy_predicted=(_numbers(table.column("energy_predicted")) - reference) / atoms,
        forces=forces,
        forces_predicted=predicted,
        atoms=atoms,
        energy_spread=_numbers(table.column("energy_spread")) / atoms,
        force_atoms=np.repeat(sizes, sizes).astype(np.float64),
        force_numbers=force_numbers,
        others={
            name: found
            for name, unit in others.items()
            if (found := _other(table, name if name == "stress" else f"target_{name}", unit)) is not None
        },
    )


def _vectors(table: pa.Table, name: str, atoms: int) -> Array:
    """Return the numbers of a column with three for each atom."""
    found = _flat(table, name)
    if len(found) != 3 * atoms:
        raise ValueError(f"'{name}' has {len(found)} numbers for {atoms} atoms")
    return found


def _numbers(column: Any) -> Array:
    """Return a column of numbers, with NaN where there is none."""
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


def _flat(table: pa.Table, name: str) -> Array:
    """Return the numbers of a column of lists, joined row after row."""
    return np.asarray(pc.list_flatten(table.column(name)).to_numpy(), dtype=np.float64)


def _other(table: pa.Table, column: str, unit: str) -> OtherParity | None:
    """Return stress or a target where it is known; None if there is none."""
    if column not in table.column_names:
        return None
    known = table.filter(pc.is_valid(table.column(column)))
    true, predicted = _flat(known, column), _flat(known, f"{column}_predicted")
    if len(true) != len(predicted):
        raise ValueError(f"'{column}' and '{column}_predicted' differ in length")
    kept = np.isfinite(true)
    return OtherParity(unit=unit, true=true[kept], predicted=predicted[kept]) if kept.any() else None
