"""Test errors of a run or an exported model, against the trivial predictor, and the predictions behind them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hydrazero.models.potential import DEFAULT_SHAPE, Potential, load_model
from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.graph import GraphSample
from hydrazero.shards.manifest import SPLITS, check_shard_files, read_manifest
from hydrazero.shards.stream import SplitReader, StreamSettings, split_samples
from hydrazero.trainer.run_files import EVALUATION_NAME, PREDICTIONS, RUN_NAME, read_json, write_json


@dataclass(frozen=True, kw_only=True)
class ResultFiles:
    """Where an evaluation is written."""

    evaluation: Path
    """JSON of errors by task."""
    predictions: Path
    """Folder of TASK.parquet."""


def results_in(folder: Path) -> ResultFiles:
    """Results of a run, or in a folder of their own."""
    return ResultFiles(evaluation=folder / EVALUATION_NAME, predictions=folder / PREDICTIONS)


def results_beside(model: Path) -> ResultFiles:
    """Results of a model file, named after it: its folder may be that of a run, which has its own."""
    name = model.name.removesuffix(".safetensors")
    return ResultFiles(
        evaluation=model.with_name(f"{name}.{EVALUATION_NAME}"), predictions=model.with_name(f"{name}.{PREDICTIONS}")
    )


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
    unseen: int = 0
    """Left out, since they hold elements that no training structure of the task does."""
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
            "unseen": self.unseen,
            "energy_mae_mev_per_atom": mean(self.energy, self.energies),
            "force_mae_mev_per_angstrom": mean(self.forces, self.components),
            "trivial_energy_mae_mev_per_atom": mean(self.trivial_energy, self.energies),
            "trivial_force_mae_mev_per_angstrom": mean(self.trivial_forces, self.components),
        }


def evaluate(
    potential: Potential,
    folders: Sequence[Path],
    split: str,
    files: ResultFiles,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate each folder's task with the head of the same name, write `files`, return what the JSON holds.

    The trivial predictor is the task's reference energies alone and zero forces, on the same structures. Structures
    with elements that no training structure of the task holds are counted, but not evaluated. Raises ShardError for
    missing or damaged shards or an empty split, ModelFileError for a task without a head, ConfigError for an unknown
    split.
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
    files.predictions.mkdir(parents=True, exist_ok=True)
    for name, rows in results.items():
        _write_table(pa.Table.from_pylist(rows, schema=SCHEMA), files.predictions / f"{name}.parquet")
    document = {"split": split, "tasks": tasks}
    write_json(files.evaluation, document)
    return document


def _write_table(table: pa.Table, path: Path) -> None:
    """Write a parquet file in one piece."""
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part)
    os.replace(part, path)


def evaluate_task(
    potential: Potential, folder: Path, task: int, split: str, progress: Callable[[int], None] | None
) -> AbsoluteErrors:
    """Predict every structure of a split with one head, except those with elements that it has not been trained on."""
    settings = StreamSettings(folders=(str(folder),), cutoff=potential.cutoff, shape=DEFAULT_SHAPE)
    errors = AbsoluteErrors()

    def seen() -> Iterator[GraphSample]:
        for sample in split_samples(SplitReader(settings, split), task_ids=[task]):
            if not potential.unseen_elements(sample.structure, potential.tasks[task]):
                yield sample
                continue
            errors.unseen += 1
            if progress is not None:
                progress(1)

    for packed, batch in potential.batches(seen(), DEFAULT_SHAPE):
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


def open_run_or_model(path: Path) -> tuple[Potential, list[Path], ResultFiles]:
    """Return potential, the run's own shard folders (none for a model file) and where results belong."""
    if path.is_dir():
        from hydrazero.trainer.checkpoint import model_of_run

        record = read_json(path / RUN_NAME)
        return Potential(model_of_run(path)), [Path(task["shards"]) for task in record["tasks"]], results_in(path)
    return load_model(path), [], results_beside(path)
