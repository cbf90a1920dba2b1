"""Evaluation of a run or an exported model: errors, those of the trivial predictor, and all predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hydrazero.models.inference.model_card import model_digest, weights_fingerprint
from hydrazero.models.inference.potential import DEFAULT_SHAPE, Potential, load_model
from hydrazero.shards.errors import ConfigError, ModelFileError, ShardError
from hydrazero.shards.files import replacing, write_json
from hydrazero.shards.graphs.graph import GraphSample
from hydrazero.shards.location import PIPE, Location
from hydrazero.shards.manifest import SPLITS, check_shard_files, read_manifest
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, split_samples
from hydrazero.trainer.evaluation.errors import AbsoluteErrors
from hydrazero.trainer.records.run_files import EVALUATION_NAME, PREDICTIONS, RUN_NAME, read_run_json
from hydrazero.trainer.records.run_lock import folder_in_use
from hydrazero.trainer.records.task_errors import Evaluation, TaskEvaluation


@dataclass(frozen=True, kw_only=True)
class ResultFiles:
    """The paths to which an evaluation is written."""

    evaluation: Path
    """JSON file of errors by task."""
    predictions: Path
    """Folder with a file TASK.parquet for each task."""
    step: int | None = None
    """Step of the run's checkpoint that is evaluated, which the JSON file repeats; None for a model file."""


def results_in(folder: Path, step: int | None = None) -> ResultFiles:
    """Return the paths of results in a folder: that of a run, or one of their own; `step` is that of a checkpoint."""
    return ResultFiles(evaluation=folder / EVALUATION_NAME, predictions=folder / PREDICTIONS, step=step)


def results_beside(model: Path) -> ResultFiles:
    """Return the paths of a model file's results, named after it: its folder may be a run's, which has its own."""
    name = model.name.removesuffix(".safetensors")
    return ResultFiles(
        evaluation=model.with_name(f"{name}.{EVALUATION_NAME}"), predictions=model.with_name(f"{name}.{PREDICTIONS}")
    )


def evaluate(
    potential: Potential,
    folders: Sequence[Location],
    split: str,
    files: ResultFiles,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate each folder's task with the head of the same name, write `files`, and return the errors.

    The trivial predictor knows the task's reference energies, and predicts zero forces and stress and the mean of the
    training labels for targets; its errors are those on the same structures. Structures with elements that no training
    structure of the task contains are counted, but not evaluated. Raise ShardError for missing or damaged shards or an
    empty split, ModelFileError for a task without a head, ConfigError for an unknown split, or if another process
    writes the same files.
    """
    if split not in SPLITS:
        raise ConfigError(f"split '{split}' is not known (known: {', '.join(SPLITS)}).")
    # A run in progress may be evaluated, but not twice at the same time.
    with folder_in_use(files.evaluation.parent, f".{files.evaluation.name}.lock", "folder of the evaluation"):
        return _evaluate(potential, folders, split, files, progress)


def _evaluate(
    potential: Potential,
    folders: Sequence[Location],
    split: str,
    files: ResultFiles,
    progress: Callable[[int], None] | None,
) -> Evaluation:
    tasks: dict[str, TaskEvaluation] = {}
    results = {}
    for folder in folders:
        manifest = read_manifest(folder)
        check_shard_files(manifest, folder)
        if manifest.task in tasks:
            raise ConfigError(f"task '{manifest.task}' is named twice ({folder}); name each task once.")
        if manifest.task not in potential.tasks:
            raise ModelFileError(
                f"{folder} holds the task '{manifest.task}', which is not among those of the model "
                f"({', '.join(potential.tasks)}); name folders of these tasks, or fine-tune the model on it first."
            )
        index = potential.task_index(manifest.task)
        if manifest.structures(split) == 0:
            raise ShardError(
                f"{folder} has no structures in the split '{split}'; evaluate another one (such as --split train), or "
                "convert again with a fraction for it."
            )
        errors = evaluate_task(potential, folder, index, split, progress)
        tasks[manifest.task] = replace(errors.summary(), fidelity=potential.model.tasks[index].fidelity)
        results[manifest.task] = errors.table()
    files.predictions.mkdir(parents=True, exist_ok=True)
    for path in files.predictions.glob("*.parquet"):
        if path.stem not in results:
            path.unlink()  # of a former evaluation, to which the new errors do not belong
    for name, table in results.items():
        _write_table(table, files.predictions / f"{name}.parquet")
    digests = {"weights": weights_fingerprint(potential.model), "model": model_digest(potential.model)}
    evaluation = Evaluation(split=split, **digests, step=files.step, tasks=tasks)
    write_json(files.evaluation, evaluation.to_json())
    return evaluation


def _write_table(table: pa.Table, path: Path) -> None:
    """Write a parquet file under a temporary name, and rename it."""
    with replacing(path) as part:
        pq.write_table(table, part)


def evaluate_task(
    potential: Potential, folder: Location, task: int, split: str, progress: Callable[[int], None] | None
) -> AbsoluteErrors:
    """Return the errors of one head on a split, without structures that contain elements on which it is not trained."""
    settings = StreamSettings(folders=(folder,), cutoff=potential.cutoff, shape=DEFAULT_SHAPE)
    errors = AbsoluteErrors(facts=potential.model.tasks[task])

    def seen() -> Iterator[GraphSample]:
        for sample in split_samples(SplitReader(settings, split), task_ids=[task]):
            if potential.why_not(sample.structure, potential.tasks[task]) is None:
                yield sample
                continue
            errors.unseen += 1
            if progress is not None:
                progress(1)

    for packed, batch in potential.batches(seen(), DEFAULT_SHAPE):
        for sample, row in zip(packed, potential.rows(packed, batch), strict=True):
            errors.add(sample.structure, row)
        if progress is not None:
            progress(len(packed))
    return errors


def open_run_or_model(path: Path) -> tuple[Potential, list[str], ResultFiles]:
    """Return the potential, where the run's own shards are (empty for a model file) and the paths of the results."""
    if path.is_dir():
        from hydrazero.trainer.checkpoint.folders import checkpoint_named, step_of
        from hydrazero.trainer.checkpoint.model_of_run import model_of_run

        record = read_run_json(path, RUN_NAME)
        step = step_of(checkpoint_named(path, "best"))  # read once: a run in progress may find a better one meanwhile
        model = model_of_run(path, str(step))
        return Potential(model), [str(task["shards"]) for task in record["tasks"]], results_in(path, step)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name a run folder or an exported model.")
    return load_model(path), [], results_beside(path)


def check_no_commands(run_dir: Path, shards: Sequence[str]) -> None:
    """Raise ConfigError if a run's record names a command, which is not run: others may have written the record."""
    for each in shards:
        if each.lstrip().startswith(PIPE):
            raise ConfigError(
                f"{run_dir / RUN_NAME} names a command for its shards ({each}), and only a run file that you start "
                f"yourself runs commands; name folders of shards instead: hydrazero evaluate {run_dir} DIR..."
            )
