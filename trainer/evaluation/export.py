"""Export of a run's model as one file, with a card that states its origin and its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.model_card import Origin, model_digest, weights_fingerprint
from hydrazero.models.inference.model_file import save_model, with_tasks
from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.checkpoint.folders import checkpoint_named, step_of
from hydrazero.trainer.checkpoint.model_of_run import model_of_run
from hydrazero.trainer.checkpoint.old_heads import with_old_heads
from hydrazero.trainer.records.identity import RUN_ID
from hydrazero.trainer.records.run_files import EVALUATION_NAME
from hydrazero.trainer.records.run_record import read_record
from hydrazero.trainer.records.task_errors import Evaluation, TaskEvaluation, read_evaluation

SUFFIX = ".safetensors"
ROUNDED = "bfloat16 rounds the weights that the run evaluated; 'hydrazero evaluate MODEL DIR' measures the errors"


def export_run(
    run_dir: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    dtype: str = "float32",
    *,
    old_heads: bool = False,
) -> AtomisticModel:
    """Write the averaged weights of a run's best checkpoint, with the named tasks' heads, and return the model.

    With `old_heads`, the file also has those heads of the run's starting model that the run did not train.

    Raise ConfigError if `out` exists or is not named FILE.safetensors, or the run has no model, ModelFileError for an
    unknown task or dtype.
    """
    if out.suffix != SUFFIX:
        raise ConfigError(f"{out}: a model is written as safetensors; name it {out.with_suffix(SUFFIX)}.")
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another name.")
    model = model_of_run(run_dir)
    evaluation = _evaluation(run_dir)
    belongs = evaluation is not None and is_of(evaluation, model, run_dir)
    if evaluation is not None and belongs:
        _set_largest_spreads(model, evaluation.tasks)
    _set_trained(model, read_record(run_dir))
    model = with_old_heads(model, run_dir) if old_heads else model
    chosen = model if tasks is None else with_tasks(model, tasks)
    save_model(chosen, out, dtype=dtype, origin=_origin(run_dir, evaluation, belongs, dtype))
    return chosen


def _evaluation(run_dir: Path) -> Evaluation | None:
    path = run_dir / EVALUATION_NAME
    return read_evaluation(path) if path.is_file() else None


def is_of(evaluation: Evaluation, model: AtomisticModel, run_dir: Path) -> bool:
    """Return whether an evaluation has measured these weights with these facts.

    Evaluations of earlier versions know the weights alone, and so do their runs.
    """
    if evaluation.model is None and read_record(run_dir).get(RUN_ID) is None:
        return evaluation.weights == weights_fingerprint(model)
    return evaluation.model == model_digest(model)


def _set_largest_spreads(model: AtomisticModel, tasks: Mapping[str, TaskEvaluation]) -> None:
    """Set the spread of the ensemble that 99% of the evaluated structures do not exceed, for each of the tasks."""
    spreads = {name: errors.energy_spread.quantile_99 for name, errors in tasks.items() if errors.energy_spread}
    model.tasks = [replace(task, largest_spread=1e-3 * spreads.get(task.name, 0.0)) for task in model.tasks]


def _set_trained(model: AtomisticModel, record: Mapping[str, Any]) -> None:
    """Set that forces and stress were not trained, where their weight in the loss was 0 throughout the run."""
    trained = {
        name: any(
            loss.get(f"{name}_weight", 1.0) or loss.get("final_weights", {}).get(name) for loss in _losses(record)
        )
        for name in ("forces", "stress")
    }
    model.tasks = [
        replace(
            task,
            has_forces=task.has_forces and trained["forces"],
            has_stress=task.has_stress and trained["stress"],
        )
        for task in model.tasks
    ]


def _losses(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of the loss after each resume, the last one first, and at the start of the run."""
    found = [dict(record.get("loss", {}))]
    for resume in reversed(record.get("resumes", [])):
        changed = {change["key"]: change["old"] for change in resume.get("changes", [])}
        old = {key.removeprefix("loss."): value for key, value in changed.items() if key.startswith("loss.")}
        found.append(found[-1] | old)
    return found


def _origin(run_dir: Path, evaluation: Evaluation | None, belongs: bool, dtype: str) -> Origin:
    step = step_of(checkpoint_named(run_dir, "best"))
    known = {"run": f"{run_dir.resolve().name}, step {step}", "data": read_record(run_dir).get("manifests", {})}
    if evaluation is None:
        return Origin(**known, no_errors="its run was not evaluated before")
    reasons = {
        "its run's last evaluation used other weights or facts": not belongs,
        f"its run's last evaluation used the split '{evaluation.split}'": evaluation.split != "test",
        ROUNDED: dtype == "bfloat16",
    }
    for reason, holds in reasons.items():
        if holds:
            return Origin(**known, no_errors=reason)
    return Origin(**known, errors={name: _errors(task) for name, task in evaluation.tasks.items()})


def _errors(task: TaskEvaluation) -> dict[str, Any]:
    """Return a task's entry in a model card: 'structures', and the errors in `ERROR_UNITS` with five digits."""
    found = {
        "energy": task.energy_mae,
        "forces": task.force_mae,
        "stress": task.stress_mae,
        **{name: target.mae for name, target in task.targets.items()},
    }
    known = {name: float(f"{value:.5g}") for name, value in found.items() if value is not None}
    return {"structures": task.structures, **known}
