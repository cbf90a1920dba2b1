"""Errors on an evaluated split, summed structure by structure, with the predictions of each structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydrazero.models.task_facts import TargetFacts, TaskFacts
from hydrazero.shards.structure import Structure
from hydrazero.trainer.records.task_errors import EnergySpread, TargetErrors, TaskEvaluation


@dataclass(kw_only=True)
class Mean:
    """Running means of a predictor's absolute errors and of the trivial predictor's."""

    count: int = 0
    """Number of components."""
    error: float = 0.0
    """Sum of absolute errors."""
    trivial: float = 0.0
    """Sum of the trivial predictor's absolute errors."""

    def add(self, predicted: Any, true: Any, trivial: Any) -> None:
        """Add the errors of the components that are known (not NaN)."""
        label = np.asarray(true, dtype=np.float64)
        known = ~np.isnan(label)
        self.count += int(known.sum())
        self.error += float(np.abs(np.asarray(predicted, dtype=np.float64) - label)[known].sum())
        self.trivial += float(np.abs(np.asarray(trivial, dtype=np.float64) - label)[known].sum())

    def values(self, factor: float = 1.0) -> tuple[float | None, float | None]:
        """Return both means, multiplied by a factor; None if nothing was added."""
        if not self.count:
            return None, None
        return factor * self.error / self.count, factor * self.trivial / self.count


def schema_of(facts: TaskFacts) -> pa.Schema:
    """Return the columns of a task's predictions; forces, stress and targets are flat lists."""
    columns = [
        ("source_id", pa.string()),
        ("numbers", pa.list_(pa.uint8())),
        ("energy", pa.float64()),
        ("energy_predicted", pa.float64()),
        ("energy_spread", pa.float64()),
        ("reference_energy", pa.float64()),
        ("forces", pa.list_(pa.float32())),
        ("forces_predicted", pa.list_(pa.float32())),
        ("stress", pa.list_(pa.float32())),
        ("stress_predicted", pa.list_(pa.float32())),
    ]
    for name in facts.targets:
        columns += [(f"target_{name}", pa.list_(pa.float64())), (f"target_{name}_predicted", pa.list_(pa.float64()))]
    return pa.schema(columns)


@dataclass(kw_only=True)
class AbsoluteErrors:
    """Running absolute errors of one task: eV per atom, eV/Å and eV/Å³ per component, targets in their own units."""

    facts: TaskFacts
    """The task."""
    structures: int = 0
    """Number of structures that were added."""
    unseen: int = 0
    """Number of structures left out because they contain elements that no training structure of the task does."""
    energy: Mean = field(default_factory=Mean)
    forces: Mean = field(default_factory=Mean)
    stress: Mean = field(default_factory=Mean)
    targets: dict[str, Mean] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Labels and predictions of each structure, in the columns of `schema_of`."""

    def add(self, structure: Structure, predicted: Mapping[str, Any]) -> None:
        """Add one structure; `predicted` is a row of `Potential.rows`, with 'reference_energy'."""
        self.structures += 1
        n = len(structure)
        row: dict[str, Any] = {
            "source_id": structure.source_id,
            "numbers": structure.numbers,
            "reference_energy": predicted["reference_energy"],
            "energy": structure.energy,
            "energy_predicted": predicted["energy"],
            "energy_spread": predicted["energy_spread"],
        }
        if structure.energy is not None and predicted["energy"] is not None:
            self.energy.add(predicted["energy"] / n, structure.energy / n, predicted["reference_energy"] / n)
        for name, mean, true in (
            ("forces", self.forces, structure.forces),
            ("stress", self.stress, structure.stress),
        ):
            if true is None or predicted[name] is None:
                continue
            # Shards hold labels in float32, and the file holds predictions in float32.
            row[name], row[f"{name}_predicted"] = flat32(true), flat32(predicted[name])
            mean.add(row[f"{name}_predicted"], row[name], 0.0)
        for name, facts in self.facts.targets.items():
            true = (structure.atom_targets if facts.of == "atom" else structure.targets).get(name)
            if true is None:
                continue
            found = np.asarray(predicted["targets"][name], dtype=np.float64)
            self.targets.setdefault(name, Mean()).add(found, true, trivial_target(facts, n))
            row[f"target_{name}"], row[f"target_{name}_predicted"] = np.ravel(true), np.ravel(found)
        self.rows.append(row)

    def table(self) -> pa.Table:
        """Return the rows of predictions."""
        return pa.Table.from_pylist(self.rows, schema=schema_of(self.facts))

    def summary(self) -> TaskEvaluation:
        """Return the mean absolute errors, and those of the trivial predictor."""
        energy, forces, stress = (mean.values(1000.0) for mean in (self.energy, self.forces, self.stress))
        targets = {}
        for name, mean in self.targets.items():
            mae, trivial_mae = mean.values()
            unit = self.facts.targets[name].unit
            targets[name] = TargetErrors(unit=unit, count=mean.count, mae=mae, trivial_mae=trivial_mae)
        return TaskEvaluation(
            structures=self.structures,
            unseen=self.unseen,
            energy_mae=energy[0],
            force_mae=forces[0],
            trivial_energy_mae=energy[1],
            trivial_force_mae=forces[1],
            stress_mae=stress[0],
            trivial_stress_mae=stress[1],
            energy_spread=spread_summary(*spreads(self.rows)),
            targets=targets,
        )


def flat32(values: Any) -> NDArray[np.float32]:
    """Return numbers as a flat float32 array."""
    return np.asarray(values, dtype=np.float32).reshape(-1)


def trivial_target(facts: TargetFacts, atoms: int) -> float:
    """Return the mean of the training labels, times the number of atoms for an extensive target of structures."""
    return facts.mean * atoms if facts.extensive and facts.of == "structure" else facts.mean


def spreads(rows: list[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return errors and spreads of energies in eV per atom, [structures] each, where both are known."""
    known = [row for row in rows if row.get("energy") is not None and row.get("energy_spread") is not None]
    atoms = np.array([len(row["numbers"]) for row in known], dtype=np.float64)
    errors = np.array([row["energy_predicted"] - row["energy"] for row in known], dtype=np.float64) / atoms
    return errors, np.array([row["energy_spread"] for row in known], dtype=np.float64) / atoms


def spread_summary(errors: NDArray[np.float64], spread: NDArray[np.float64]) -> EnergySpread | None:
    """Return how well the spread of an ensemble predicts its errors [structures], in eV; None without an ensemble.

    If errors were normally distributed with the spread as their standard deviation, the root mean square of error over
    spread would be 1, and 68% of the errors would lie within one spread and 95% within two.
    """
    known = spread > 0
    if not known.any():
        return None
    ratio = np.abs(errors[known]) / spread[known]
    return EnergySpread(
        count=int(known.sum()),
        mean=1000.0 * float(spread[known].mean()),
        quantile_99=1000.0 * float(np.quantile(spread[known], 0.99)),
        error_over_spread=float(np.sqrt((ratio**2).mean())),
        within_one=float((ratio <= 1).mean()),
        within_two=float((ratio <= 2).mean()),
    )
