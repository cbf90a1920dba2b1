"""Errors of the new task and of old tasks before and after a fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.potential import Potential
from hydrazero.models.task_facts import task_facts_from
from hydrazero.shards.convert.references import reference_table
from hydrazero.shards.files import write_json
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.stream.stream import SplitReader, StreamSettings, split_samples
from hydrazero.trainer.checkpoint.folders import checkpoint_named, step_of
from hydrazero.trainer.checkpoint.model_of_run import model_of_run
from hydrazero.trainer.checkpoint.old_heads import with_old_heads
from hydrazero.trainer.evaluation.errors import Mean
from hydrazero.trainer.evaluation.evaluate import evaluate, evaluate_task, results_in
from hydrazero.trainer.records.progress_line import wide_console
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, read_run_json
from hydrazero.trainer.records.run_log import shown
from hydrazero.trainer.records.task_errors import ReferenceErrors, TaskEvaluation
from hydrazero.trainer.start.head_errors import HeadErrors, head_model

OUTCOME_NAME = "finetune.json"
"""Name of the file in the run folder that contains the errors before and after."""


def split_to_judge_by(folder: Path) -> str | None:
    """Return 'test' if shards have structures in that split, else 'val', or None if they have none in either."""
    manifest = read_manifest(folder)
    return next((split for split in ("test", "val") if manifest.structures(split)), None)


def measure_outcome(
    run_dir: Path, start: AtomisticModel, rows: Sequence[int], new: Path, old: Sequence[Path]
) -> dict[str, Any]:
    """Measure the errors of the new task and of old tasks before and after, and write RUN/finetune.json.

    `rows` are the heads of the starting model from which the new head started; `old` are shards of tasks of the
    starting model. Errors are those on the test split, or on the validation split if a task has no test split. The new
    task's errors are also written as the run's evaluation.
    """
    task = read_manifest(new).task
    (facts,) = (table for table in read_run_json(run_dir, MODEL_FACTS_NAME)["tasks"] if table["name"] == task)
    before, after = head_model(start, task_facts_from(facts), rows), model_of_run(run_dir)
    split = split_to_judge_by(new)
    document: dict[str, Any] = {"task": task, "split": split, "begun_as": [start.tasks[row].name for row in rows]}
    if split is not None:
        document["trivial"] = reference_errors(new, split).to_json()
        document["before"] = _errors(before, new, split).to_json() if rows else None
        step = step_of(checkpoint_named(run_dir, "best"))
        evaluation = evaluate(Potential(after), [new], split, results_in(run_dir, step))
        document["after"] = evaluation.tasks[task].to_json()
    joined = with_old_heads(after, run_dir) if old else after
    document["old"] = {}
    for folder in old:
        old_split, name = split_to_judge_by(folder), read_manifest(folder).task
        if old_split is not None:
            models = {"before": start, "after": joined}
            errors = {when: _errors(model, folder, old_split).to_json() for when, model in models.items()}
            document["old"][name] = {"split": old_split, **errors}
        else:
            document["old"][name] = None
    write_json(run_dir / OUTCOME_NAME, document, shared=True)
    return document


def _errors(model: AtomisticModel, folder: Path, split: str) -> TaskEvaluation:
    potential = Potential(model)
    index = potential.task_index(read_manifest(folder).task)
    return evaluate_task(potential, folder, index, split, None).summary()


def reference_errors(folder: Path, split: str) -> ReferenceErrors:
    """Return the errors of the reference energies in the shards, and of zero forces, on a split.

    The reference energies of the fine-tuned head would be of no use here: they were fitted to what remains of the
    energies beside the head's predictions, while those of the shards were fitted to the energies themselves.
    """
    shape = BatchShape(structures=1, atoms=1, slots=ROW_SLOTS)  # has no influence on the samples that are read
    reader = SplitReader(StreamSettings(folders=(str(folder),), cutoff=1.0, shape=shape), split)
    references = np.nan_to_num(reference_table(read_manifest(folder).reference_energies))
    energies, forces, structures = Mean(), Mean(), 0
    for sample in split_samples(reader):
        structure, structures = sample.structure, structures + 1
        if structure.energy is not None:
            trivial = float(references[structure.numbers].sum())
            energies.add(trivial / len(structure), structure.energy / len(structure), 0.0)
        if structure.forces is not None:
            forces.add(np.zeros_like(structure.forces), structure.forces, 0.0)
    energy_mae, force_mae = energies.values(1000.0)[0], forces.values(1000.0)[0]
    return ReferenceErrors(structures=structures, energy_mae=energy_mae, force_mae=force_mae)


def print_heads(heads: Sequence[HeadErrors]) -> None:
    """Print the errors of all heads on the new training structures, the nearest head first."""
    title = "heads on the new training structures"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("head", no_wrap=True)
    table.add_column("fidelity", no_wrap=True)
    for heading in ("E MAE, refitted\nmeV/atom", "F MAE\nmeV/Å"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("not trained on")
    for head in heads:
        energy, force = (None if error is None else 1000 * error for error in (head.energy_mae, head.force_mae))
        table.add_row(head.name, head.fidelity, shown(energy, 2), shown(force), ", ".join(head.lacks))
    wide_console(stderr=False).print(table)


def print_outcome(document: dict[str, Any], say: Callable[[str], None]) -> None:
    """Print the errors before and after as tables."""
    if document["split"] is None:
        say("the new task has neither test nor validation structures, so its errors cannot be measured.")
    else:
        begun = "nothing" if not document["begun_as"] else " and ".join(document["begun_as"][:1])
        begun = "mean of all heads" if len(document["begun_as"]) > 1 else f"{begun}, references refitted"
        rows = [("trivial", document["trivial"])]
        rows += [(begun, document["before"])] if document["before"] else []
        rows.append(("fine-tuned", document["after"]))
        table = _table(f"{document['task']}, {document['split']} split", "")
        for name, row in rows:
            errors = ReferenceErrors.from_json(row)
            table.add_row(name, str(errors.structures), shown(errors.energy_mae, 2), shown(errors.force_mae))
        wide_console(stderr=False).print(table)
        if sentence := worse_than_before(document):
            say(sentence)
    if document["old"]:
        print_forgetting(document["old"])


def worse_than_before(document: dict[str, Any]) -> str:
    """Return a warning if an error of the new task is larger than that of the head it started from, else ""."""
    if not document["before"]:
        return ""
    before, after = (TaskEvaluation.from_json(document[when]) for when in ("before", "after"))
    pairs = (
        ("energy MAE", before.energy_mae, after.energy_mae, "meV/atom"),
        ("force MAE", before.force_mae, after.force_mae, "meV/Å"),
    )
    worse = [
        f"{name} {now:.4g} instead of {old:.4g} {unit}"
        for name, old, now, unit in pairs
        if old is not None and now is not None and not now <= old
    ]
    if not worse:
        return ""
    return (
        f"warning: the fine-tuned head is worse than the head that it started from ({', '.join(worse)}, "
        f"{document['split']} split): train longer (--steps), use a lower learning rate (--lr), or train the head "
        "alone (--method heads)."
    )


def print_forgetting(old: dict[str, Any]) -> None:
    """Print the errors of old tasks before and after."""
    table = Table(title="old tasks, before and after", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "split"):
        table.add_column(heading, no_wrap=True)
    for heading in ("struc-\ntures", "E MAE\nmeV/atom", "\nafter", "F MAE\nmeV/Å", "\nafter"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in old.items():
        if row is None:
            table.add_row(name, "neither test nor val")
            continue
        both = [TaskEvaluation.from_json(row[when]) for when in ("before", "after")]
        cells = [shown(errors.energy_mae, 2) for errors in both] + [shown(errors.force_mae) for errors in both]
        table.add_row(name, row["split"], str(both[0].structures), *cells)
    wide_console(stderr=False).print(table)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in ("struc-\ntures", "E MAE\nmeV/atom", "F MAE\nmeV/Å"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table
