"""Test errors of a run or an exported model, against the trivial predictor, and the predictions behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hydrazero.models.potential import DEFAULT_SHAPE, Potential, load_model
from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.manifest import SPLITS, check_shard_files, read_manifest
from hydrazero.shards.stream import SplitReader, StreamSettings, split_samples
from hydrazero.trainer.run_files import EVALUATION_NAME, PREDICTIONS, RUN_NAME, read_json, write_json

SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("numbers", pa.list_(pa.uint8())),
        ("energy", pa.float64()),
        ("energy_predicted", pa.float64()),
        ("reference_energy", pa.float64()),
        ("forces", pa.list_(pa.float32())),
        ("forces_predicted", pa.list_(pa.float32())),
    ]
)


@dataclass(kw_only=True)
class AbsoluteErrors:
    """Running sums of absolute errors of one task: eV per atom and eV/Å per component."""

    structures: int = 0
    energies: int = 0
    components: int = 0
    energy: float = 0.0
    forces: float = 0.0
    trivial_energy: float = 0.0
    trivial_forces: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Count one structure, a row of SCHEMA."""
        self.structures += 1
        self.rows.append(row)
        n = len(row["numbers"])
        if row["energy"] is not None:
            self.energies += 1
            self.energy += abs(row["energy_predicted"] - row["energy"]) / n
            self.trivial_energy += abs(row["reference_energy"] - row["energy"]) / n
        if row["forces"] is not None:
            self.components += 3 * n
            self.forces += float(np.abs(row["forces_predicted"].astype(np.float64) - row["forces"]).sum())
            self.trivial_forces += float(np.abs(row["forces"].astype(np.float64)).sum())

    def summary(self) -> dict[str, Any]:
        """Mean absolute errors in meV/atom and meV/Å; None where there is no such label."""

        def mean(total: float, count: int) -> float | None:
            return 1000.0 * total / count if count else None

        return {
            "structures": self.structures,
            "energy_mae_mev_per_atom": mean(self.energy, self.energies),
            "force_mae_mev_per_angstrom": mean(self.forces, self.components),
            "trivial_energy_mae_mev_per_atom": mean(self.trivial_energy, self.energies),
            "trivial_force_mae_mev_per_angstrom": mean(self.trivial_forces, self.components),
        }


def evaluate(
    potential: Potential,
    folders: Sequence[Path],
    split: str,
    out: Path,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate each folder's task with the head of the same name; writes evaluation.json and predictions/ into `out`.

    The trivial predictor is the task's reference energies alone and zero forces, on the same structures. Raises
    ShardError for missing or damaged shards, ModelFileError for a task without a head, ConfigError for an unknown or
    empty split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split '{split}' is not known (known: {', '.join(SPLITS)}).")
    tasks: dict[str, Any] = {}
    results = {}
    for folder in folders:
        manifest = read_manifest(folder)
        check_shard_files(manifest, folder)
        if manifest.task in tasks:
            raise ConfigError(f"task '{manifest.task}' is named twice ({folder}).")
        index = potential.task_index(manifest.task)
        if manifest.structures(split) == 0:
            raise ShardError(f"{folder} has no structures in the split '{split}'.")
        errors = evaluate_task(potential, folder, index, split, progress)
        tasks[manifest.task] = {**errors.summary(), "fidelity": potential.model.tasks[index].fidelity}
        results[manifest.task] = errors.rows
    (out / PREDICTIONS).mkdir(parents=True, exist_ok=True)
    for name, rows in results.items():
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out / PREDICTIONS / f"{name}.parquet")
    document = {"split": split, "tasks": tasks}
    write_json(out / EVALUATION_NAME, document)
    return document


def evaluate_task(
    potential: Potential, folder: Path, task: int, split: str, progress: Callable[[int], None] | None
) -> AbsoluteErrors:
    """Predict every structure of a split with one head."""
    settings = StreamSettings(folders=(str(folder),), cutoff=potential.cutoff, shape=DEFAULT_SHAPE)
    errors = AbsoluteErrors()
    samples = split_samples(SplitReader(settings, split), task_ids=[task])
    for packed, batch in potential.batches(samples, DEFAULT_SHAPE):
        predictions = potential.model(batch)
        energy = predictions.energy.cpu().numpy()
        forces = predictions.forces.detach().cpu().numpy().astype(np.float32)
        reference = predictions.reference.cpu().numpy()
        first = 0
        for number, sample in enumerate(packed):
            structure, atoms = sample.structure, slice(first, first + len(sample.structure))
            first = atoms.stop
            labelled = structure.forces is not None
            errors.add(
                {
                    "source_id": structure.source_id,
                    "numbers": structure.numbers,
                    "energy": structure.energy,
                    "energy_predicted": float(energy[number]),
                    "reference_energy": float(reference[number]),
                    "forces": structure.forces.astype(np.float32).reshape(-1) if structure.forces is not None else None,
                    "forces_predicted": forces[atoms].reshape(-1) if labelled else None,
                }
            )
        if progress is not None:
            progress(len(packed))
    return errors


def open_run_or_model(path: Path) -> tuple[Potential, list[Path], Path]:
    """Return potential, the run's own shard folders (none for a model file) and where results belong."""
    if path.is_dir():
        from hydrazero.trainer.checkpoint import model_of_run

        record = read_json(path / RUN_NAME)
        return Potential(model_of_run(path)), [Path(task["shards"]) for task in record["tasks"]], path
    return load_model(path), [], path.parent
