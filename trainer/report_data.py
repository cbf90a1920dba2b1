"""What the report shows, gathered from a run folder into arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ase.data import chemical_symbols
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.evaluation_errors import spreads
from hydrazero.trainer.run_files import EVALUATION_NAME, PREDICTIONS, RUN_NAME, read_json, read_metrics


@dataclass(frozen=True, kw_only=True)
class TaskPredictions:
    """Labels and predictions of one task's evaluated structures."""

    energy: NDArray[np.float64]
    """eV per atom, references subtracted, [structures]."""
    energy_predicted: NDArray[np.float64]
    forces: NDArray[np.float64]
    """eV/Å, [components]; empty where the task has none."""
    forces_predicted: NDArray[np.float64]
    energy_error: NDArray[np.float64]
    """eV per atom, of structures whose energy and spread are known."""
    energy_spread: NDArray[np.float64]
    """eV per atom, of the same; empty without an ensemble."""
    force_error_by_element: dict[str, float]
    """Mean absolute error of force components on atoms of an element, meV/Å."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run folder's content."""

    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None = None
    predictions: dict[str, TaskPredictions] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """Names of the run's tasks."""
        return [task["name"] for task in self.record["tasks"]]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl of one kind: 'train' or 'evaluation'."""
        return [row for row in self.metrics if row["kind"] == kind]

    def series(self, kind: str, task: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one task's quantity, steps without it left out."""
        pairs = [(row["step"], row["tasks"].get(task, {}).get(key)) for row in self.rows(kind)]
        kept = [(step, value) for step, value in pairs if value is not None and value > 0]
        return [step for step, _ in kept], [value for _, value in kept]


def read_run(run_dir: Path) -> RunData:
    """Read a run folder; raises ConfigError naming the file that is missing or damaged."""
    record, metrics = read_json(run_dir / RUN_NAME), read_metrics(run_dir)
    if not (run_dir / EVALUATION_NAME).is_file():
        return RunData(record=record, metrics=metrics)
    evaluation = read_json(run_dir / EVALUATION_NAME)
    predictions = {name: read_predictions(run_dir / PREDICTIONS / f"{name}.parquet") for name in evaluation["tasks"]}
    return RunData(record=record, metrics=metrics, evaluation=evaluation, predictions=predictions)


def read_predictions(path: Path) -> TaskPredictions:
    """Read one task's predictions; raises ConfigError if the file is missing or damaged."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{path} cannot be read ({error}); run 'hydrazero evaluate' again.") from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    atoms = np.array([len(numbers) for numbers in columns["numbers"]], dtype=np.float64)
    reference = np.array(columns["reference_energy"], dtype=np.float64)
    energy = (np.array(columns["energy"], dtype=np.float64) - reference) / atoms
    predicted = (np.array(columns["energy_predicted"], dtype=np.float64) - reference) / atoms
    labelled = [row for row, forces in enumerate(columns["forces"]) if forces is not None]
    forces = _joined([columns["forces"][row] for row in labelled])
    forces_predicted = _joined([columns["forces_predicted"][row] for row in labelled])
    numbers = np.repeat(_joined([columns["numbers"][row] for row in labelled]).astype(int), 3)
    errors = np.abs(forces_predicted - forces)
    errors_and_spreads = spreads(table.select(["numbers", "energy", "energy_predicted", "energy_spread"]).to_pylist())
    by_element = {chemical_symbols[z]: float(1000 * errors[numbers == z].mean()) for z in np.unique(numbers)}
    return TaskPredictions(
        energy=energy,
        energy_predicted=predicted,
        forces=forces,
        forces_predicted=forces_predicted,
        energy_error=errors_and_spreads[0],
        energy_spread=errors_and_spreads[1],
        force_error_by_element=by_element,
    )


def _joined(parts: list[list[float]]) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts]) if parts else np.zeros(0)
