"""A run's model as one file, with a card that says where it comes from and how well it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.model_card import Origin, weights_fingerprint
from hydrazero.models.inference.model_file import save_model, with_tasks
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_json
from hydrazero.trainer.checkpoint.folders import checkpoint_named, step_of
from hydrazero.trainer.checkpoint.model_of_run import model_of_run
from hydrazero.trainer.checkpoint.old_heads import with_old_heads
from hydrazero.trainer.records.run_files import EVALUATION_NAME
from hydrazero.trainer.records.run_record import read_record

SUFFIX = ".safetensors"
ROUNDED = "bfloat16 rounds the weights that the run's evaluation is of; 'hydrazero evaluate MODEL DIR' measures these"


def export_run(
    run_dir: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    dtype: str = "float32",
    *,
    old_heads: bool = False,
) -> AtomisticModel:
    """Write a run's averaged weights of its best checkpoint, with the named tasks' heads; returns the model.

    With `old_heads` it also has those heads of the model that the run started from which it has not trained.

    Raises ConfigError if `out` exists or is not named FILE.safetensors, or the run has no model, ModelFileError for an
    unknown task or dtype.
    """
    if out.suffix != SUFFIX:
        raise ConfigError(f"{out}: a model is written as safetensors; name it {out.with_suffix(SUFFIX)}.")
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another name.")
    model = model_of_run(run_dir)
    evaluation = _evaluation(run_dir)
    belongs = evaluation.get("weights") == weights_fingerprint(model)
    if belongs:
        _tell_spread(model, evaluation["tasks"])
    model = with_old_heads(model, run_dir) if old_heads else model
    chosen = model if tasks is None else with_tasks(model, tasks)
    save_model(chosen, out, dtype=dtype, origin=_origin(run_dir, evaluation, belongs, dtype))
    return chosen


def _evaluation(run_dir: Path) -> dict[str, Any]:
    path = run_dir / EVALUATION_NAME
    document: dict[str, Any] = read_json(path) if path.is_file() else {}
    return document


def _tell_spread(model: AtomisticModel, rows: dict[str, Any]) -> None:
    """Let the tasks know which spread of the ensemble the evaluated structures had."""
    spreads = {name: row["energy_spread"]["most_mev_per_atom"] for name, row in rows.items() if row["energy_spread"]}
    model.tasks = [replace(task, largest_spread=1e-3 * spreads.get(task.name, 0.0)) for task in model.tasks]


def _origin(run_dir: Path, evaluation: dict[str, Any], belongs: bool, dtype: str) -> Origin:
    step = step_of(checkpoint_named(run_dir, "best"))
    known = {"run": f"{run_dir.resolve().name}, step {step}", "data": read_record(run_dir).get("manifests", {})}
    reasons = {
        "its run was not evaluated before": not evaluation,
        "its run's last evaluation was of other weights": not belongs,
        f"its run's last evaluation was of the split '{evaluation.get('split')}'": evaluation.get("split") != "test",
        ROUNDED: dtype == "bfloat16",
    }
    for reason, holds in reasons.items():
        if holds:
            return Origin(**known, no_errors=reason)
    return Origin(**known, errors={name: _errors(row) for name, row in evaluation["tasks"].items()})


def _errors(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a card tells of a task's row of an evaluation: 'structures', and errors in `ERROR_UNITS`."""
    found = {
        "energy": row["energy_mae_mev_per_atom"],
        "forces": row["force_mae_mev_per_angstrom"],
        "stress": row["stress_mae_mev_per_angstrom3"],
        **{name: target["mae"] for name, target in row["targets"].items()},
    }
    known = {name: float(f"{value:.5g}") for name, value in found.items() if value is not None}
    return {"structures": row["structures"], **known}
