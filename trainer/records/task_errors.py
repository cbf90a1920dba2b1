"""Errors by task, and the one home of the names that they have in metrics.jsonl, evaluation.json and finetune.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import check_shape, read_json
from hydrazero.shards.text.names import check_name
from hydrazero.trainer.records.file_shapes import EvaluationShape

KEYS = {
    "energy_mae": "energy_mae_mev_per_atom",
    "force_mae": "force_mae_mev_per_angstrom",
    "stress_mae": "stress_mae_mev_per_angstrom3",
    "trivial_energy_mae": "trivial_energy_mae_mev_per_atom",
    "trivial_force_mae": "trivial_force_mae_mev_per_angstrom",
    "trivial_stress_mae": "trivial_stress_mae_mev_per_angstrom3",
    "mean_energy_spread": "energy_spread_mev_per_atom",
    "target_maes": "target_mae",
    "mean": "mean_mev_per_atom",
    "quantile_99": "most_mev_per_atom",
}
"""Attributes whose names in JSON are others, with those names."""
OMITTED = ("unseen", "fidelity")
"""Attributes that are left out of JSON if they are None."""


class JsonFields:
    """A dataclass that is a table in a JSON file; its keys have the order of its fields."""

    def to_json(self) -> dict[str, Any]:
        """Return the table as it is written."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        kept = {name: value for name, value in values.items() if value is not None or name not in OMITTED}
        return {KEYS.get(name, name): _to_json(value) for name, value in kept.items()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Return what a table holds; a field has its default if the table, of an older version, lacks its key."""
        keys = {each.name: KEYS.get(each.name, each.name) for each in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: row[key] for name, key in keys.items() if key in row})


def _to_json(value: Any) -> Any:
    if isinstance(value, JsonFields):
        return value.to_json()
    return {key: _to_json(one) for key, one in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, kw_only=True)
class ReferenceErrors(JsonFields):
    """Mean absolute errors of the reference energies alone and zero forces; None where there is no label."""

    structures: int = 0
    """Number of structures."""
    energy_mae: float | None = None
    """Error of energies, meV per atom."""
    force_mae: float | None = None
    """Error of force components, meV/Å."""


@dataclass(frozen=True, kw_only=True)
class TaskErrors(JsonFields):
    """Mean absolute errors and losses of a task in a row of metrics.jsonl; None where there is no label."""

    structures: int = 0
    """Number of structures."""
    energy_mae: float | None = None
    """Error of energies, meV per atom."""
    force_mae: float | None = None
    """Error of force components, meV/Å."""
    stress_mae: float | None = None
    """Error of stress components, meV/Å³."""
    mean_energy_spread: float | None = None
    """Mean spread of an ensemble's energies, meV per atom."""
    target_maes: dict[str, float | None] = field(default_factory=dict)
    """Errors of the targets in their own units, by name."""
    energy_loss: float | None = None
    """Mean loss of energies."""
    forces_loss: float | None = None
    """Mean loss of force components, or of force vectors if `loss.force_errors` is 'norm'."""
    unseen: int | None = None
    """Number of structures left out because of elements on which the task is not trained; None: not counted."""

    def scalars(self) -> dict[str, float | None]:
        """Return the errors and losses under their names in JSON, the error of each target as 'TARGET_mae'."""
        row = self.to_json()
        row = {key: row[key] for key in row if key not in ("structures", "unseen", KEYS["target_maes"])}
        return row | {f"{target}_mae": value for target, value in self.target_maes.items()}


@dataclass(frozen=True, kw_only=True)
class EnergySpread(JsonFields):
    """Comparison of the spread of an ensemble's energies with their errors, which it is to predict."""

    count: int
    """Number of structures."""
    mean: float
    """Mean spread, meV per atom."""
    quantile_99: float
    """Spread that 99% of the structures do not exceed, meV per atom."""
    error_over_spread: float
    """Root mean square of error divided by spread."""
    within_one: float
    """Fraction of the errors that are at most the spread."""
    within_two: float
    """Fraction of the errors that are at most twice the spread."""


@dataclass(frozen=True, kw_only=True)
class TargetErrors(JsonFields):
    """Errors of one target."""

    unit: str
    """Unit of the errors."""
    count: int = 0
    """Number of labelled components."""
    mae: float | None = None
    """Mean absolute error."""
    trivial_mae: float | None = None
    """Mean absolute error of predicting the mean of the training labels."""


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation(JsonFields):
    """Mean absolute errors of a task in evaluation.json, and those of the trivial predictor on the same structures.

    The trivial predictor knows the task's reference energies, and predicts zero forces and stress. Errors are None
    where there is no label.
    """

    structures: int = 0
    """Number of structures that were evaluated."""
    unseen: int = 0
    """Number of structures left out because of elements on which the task is not trained."""
    energy_mae: float | None = None
    """Error of energies, meV per atom."""
    force_mae: float | None = None
    """Error of force components, meV/Å."""
    trivial_energy_mae: float | None = None
    """The trivial predictor's error of energies, meV per atom."""
    trivial_force_mae: float | None = None
    """The trivial predictor's error of force components, meV/Å."""
    stress_mae: float | None = None
    """Error of stress components, meV/Å³."""
    trivial_stress_mae: float | None = None
    """The trivial predictor's error of stress components, meV/Å³."""
    energy_spread: EnergySpread | None = None
    """None without an ensemble."""
    targets: dict[str, TargetErrors] = field(default_factory=dict)
    """Errors of the targets that have labels, by name."""
    fidelity: str | None = None
    """Level of theory of the labels; None where it is not recorded."""

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Return what a task's table in evaluation.json holds."""
        spread = row.get("energy_spread")
        targets = {name: TargetErrors.from_json(errors) for name, errors in row.get("targets", {}).items()}
        return super().from_json(
            {**row, "energy_spread": EnergySpread.from_json(spread) if spread else None, "targets": targets}
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation(JsonFields):
    """The content of evaluation.json."""

    split: str
    """Split of the data that was evaluated: 'train', 'val' or 'test'."""
    weights: str | None = None
    """Fingerprint of the model's weights; None in files of older versions."""
    model: str | None = None
    """Digest of the model's weights and facts, see `model_digest`; None in files of older versions."""
    step: int | None = None
    """Step of the run's checkpoint that was evaluated; None for a model file, and in files of older versions."""
    tasks: dict[str, TaskEvaluation] = field(default_factory=dict)
    """Errors by task."""

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Return what evaluation.json holds."""
        return super().from_json(
            {
                **row,
                "tasks": {
                    check_name(name, "the task"): TaskEvaluation.from_json(task) for name, task in row["tasks"].items()
                },
            }
        )


def read_evaluation(path: Path) -> Evaluation:
    """Return what an evaluation.json holds; raise ConfigError if it cannot be read, or holds something else."""
    again = "run 'hydrazero evaluate' again"
    document = read_json(path, shape=EvaluationShape, hint=again)
    try:
        evaluation = Evaluation.from_json(document)
        table = asdict(evaluation)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} lacks or misuses a field ({error}); {again}.") from error
    check_shape(table, str(path), Evaluation, hint=again)
    return evaluation
