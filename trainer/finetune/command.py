"""What `hydrazero finetune` does: compare heads, write and train a run file, measure errors before and after."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.files import check_writable, replacing, toml_text
from hydrazero.shards.manifest import read_manifest
from hydrazero.trainer.checkpoint.model_of_run import read_run_or_model
from hydrazero.trainer.config.finetune_section import HEADS, MEAN, METHODS, NEAREST, NEW
from hydrazero.trainer.config.run_file import RunConfig, apply_override, load_run_config
from hydrazero.trainer.config.sections import TaskSection
from hydrazero.trainer.config.tasks import task_facts
from hydrazero.trainer.finetune.outcome import measure_outcome, print_heads, print_outcome
from hydrazero.trainer.finetune.plan import FinetunePlan, FinetuneRequest, plan_finetuning
from hydrazero.trainer.setup import check_run
from hydrazero.trainer.start.head_errors import HeadErrors
from hydrazero.trainer.start.head_starts import check_units, compare_heads, rows_of
from hydrazero.trainer.train import TrainOptions, train_here

RUN_FILE = "run.toml"
"""Name of the run file in the run folder."""


def finetune(request: FinetuneRequest, say: Callable[[str], None]) -> None:
    """Fine-tune a model; raise HydrazeroError for arguments, models or shards that cannot be used."""
    check_writable(request.out.parent, "name another run folder with --out")
    start = read_run_or_model(str(request.model))
    _check(request, start)
    heads = _heads(request, start)
    rows = rows_of(heads[0].name, start) if heads else ()
    plan = plan_finetuning(request, heads[0].name if heads else NEW, start)
    run_file, config = _write_run_file(request, plan, heads)
    for sentence in plan.sentences:
        say(sentence)
    say(train_here(run_file, config, TrainOptions(ranks=request.ranks)))
    print_outcome(measure_outcome(request.out, start, rows, request.folder, request.old), say)
    out = shlex.quote(str(request.out))
    say(f"run file: {run_file}; to continue the run: hydrazero train {out}/{RUN_FILE} --resume")
    say(f"to use the model: hydrazero export {out} --out {out}/model.safetensors")


def _check(request: FinetuneRequest, start: AtomisticModel) -> None:
    """Raise ConfigError for arguments that cannot be used, or not together."""
    if request.rate is not None and not 0 <= request.rate < math.inf:
        raise ConfigError(f"--lr is {request.rate}; it must be a number of at least 0.")
    names, manifest = [task.name for task in start.tasks], read_manifest(request.folder)
    if not manifest.structures("train"):
        raise ConfigError(
            f"{request.folder} has no training structures; convert it again with a fraction for the training split."
        )
    if request.method not in METHODS:
        raise ConfigError(f"--method '{request.method}' is not known{did_you_mean(request.method, list(METHODS))}.")
    if request.init_head not in (*names, NEAREST, MEAN, NEW):
        raise ConfigError(
            f"--init-head: {request.model} has no head '{request.init_head}'{did_you_mean(request.init_head, names)}."
        )
    old = [read_manifest(folder).task for folder in request.old]
    for name, folder in zip(old, request.old, strict=True):
        if name not in names:
            raise ConfigError(
                f"--replay-data {folder} contains task '{name}', but {request.model} has no such "
                f"head{did_you_mean(name, names)}."
            )
        if old.count(name) > 1 or name == manifest.task:
            raise ConfigError(f"--replay-data {folder}: task '{name}' is named twice; give each task once.")
    if request.replay is None:
        return
    if not 0 < request.replay < 1:
        raise ConfigError(f"--replay is {request.replay}; it must be above 0 and below 1.")
    if not request.old:
        raise ConfigError(
            "--replay needs structures of old tasks; name the shards of each task with --replay-data DIR."
        )
    if request.method == HEADS:
        raise ConfigError("--replay has no effect with --method heads, which changes no old task; leave it out.")


def _heads(request: FinetuneRequest, start: AtomisticModel) -> list[HeadErrors]:
    """Return the errors of heads on the new structures, that of the head from which the new one starts first.

    If the new head starts from the nearest one, all heads are compared, and the comparison is printed. If it starts
    from random weights, the list is empty.
    """
    manifest = read_manifest(request.folder)
    task = TaskSection(name=manifest.task, shards=str(request.folder), init_head=request.init_head)
    facts = task_facts(task, manifest)
    if request.init_head == NEW:
        return []
    if request.init_head != NEAREST:
        return compare_heads(start, task, facts, [rows_of(request.init_head, start)])
    heads = compare_heads(start, task, facts, [(row,) for row in range(len(start.tasks))])
    print_heads(heads)
    return heads


def _write_run_file(
    request: FinetuneRequest, plan: FinetunePlan, heads: Sequence[HeadErrors]
) -> tuple[Path, RunConfig]:
    """Check the run file and write it as RUN/run.toml; raise ConfigError if it cannot be used or written."""
    for override in request.overrides:
        apply_override(plan.table, override)
    comment = [
        f"Fine-tuning of {request.model} on {request.folder}, written by hydrazero finetune.",
        f"Train it with: hydrazero train {request.out / RUN_FILE} (with --resume to continue it).",
    ]
    path = request.out / RUN_FILE
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(request.out, shared=True) as folder:
            folder.mkdir()
            part = folder / RUN_FILE
            part.write_text(toml_text(plan.table, comment), encoding="utf-8")
            config = load_run_config(part)
            check_run(config, resume=False)
            if config.finetune.check_units:
                check_units(config.tasks[0], heads)
    except OSError as error:
        raise ConfigError(f"{request.out} cannot be written ({error.strerror}).") from error
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{part}:", "--set:")) from error
    return path, config
