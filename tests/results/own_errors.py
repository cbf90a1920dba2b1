"""Errors and costs of a run of hydrazero, in the form of those of other tools."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from results.label_errors import LabelErrors

from hydrazero.trainer.evaluation.evaluate import evaluate_task, open_run_or_model
from hydrazero.trainer.records.run_files import PREDICTIONS


def errors_and_costs(out: Path, validated: Path, shards: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Return what tables of equal time show of a run in `out` on a dataset of one table's TOML file.

    It has been evaluated on the test set, and in the folder `validated` on the validation set.
    """
    validation, test = (predicted(folder / PREDICTIONS / f"{data['name']}.parquet") for folder in (validated, out))
    potential, _, _ = open_run_or_model(out)
    seconds = []
    for _ in range(2):  # the first time warms up
        started = time.perf_counter()
        evaluate_task(potential, str(shards), potential.task_index(data["name"]), "test", None)
        seconds.append(time.perf_counter() - started)
    return {
        "parameters": sum(weights.numel() for weights in potential.model.parameters()),
        "predicted_per_s": len(test.names) / seconds[-1],
        "val": validation.summary(),
        "test": test.summary(),
        "groups": test.of_groups(data.get("groups", [])),
    }


def predicted(path: Path) -> LabelErrors:
    """Return the errors of the predictions in a file that `hydrazero evaluate` has written."""
    rows = pq.read_table(path).to_pylist()
    forces = [np.subtract(row["forces_predicted"], row["forces"], dtype=np.float64) for row in rows]
    energies = [(row["energy_predicted"] - row["energy"]) / len(row["numbers"]) for row in rows]
    return LabelErrors(names=[row["source_id"] for row in rows], energies=np.array(energies), forces=forces)
