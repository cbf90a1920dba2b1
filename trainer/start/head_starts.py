"""How the heads of a run start: from heads of the model `run.start_from`, with reference energies fitted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.model_settings import HeadSettings
from hydrazero.models.task_facts import CONSERVATIVE, NONE, TargetFacts, TaskFacts, task_facts_from
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.trainer.config.finetune_section import HEADS, MEAN, NEAREST, NEW, OWN, FinetuneSection
from hydrazero.trainer.config.sections import TaskSection
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, read_run_json
from hydrazero.trainer.start.head_errors import (
    COMPARED,
    FITTED,
    HeadErrors,
    compositions_of,
    head_errors,
    head_model,
    interactions,
    refitted,
    spread_samples,
)
from hydrazero.trainer.start.unit_check import ALIKE, suspicion

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HeadStart:
    """The start of the head of a task."""

    rows: tuple[int, ...]
    """Heads of the starting model whose mean it is; empty for random weights."""
    facts: TaskFacts
    """Facts of the task, with those that it takes over from these heads."""
    said: tuple[str, ...] = ()
    """Sentences for the log."""


def check_heads(tasks: Sequence[TaskSection], heads: HeadSettings, start: AtomisticModel, source: str) -> None:
    """Raise ConfigError for a head that the model does not have, or that would not fit the heads of the run.

    `source` is the place that the model `start` was read from, for the message.
    """
    names = [task.name for task in start.tasks]
    for task in tasks:
        if not task.init_head:
            continue
        wanted = task.name if task.init_head == OWN else task.init_head
        if wanted not in (*names, NEAREST, MEAN, NEW):
            raise ConfigError(
                f"task '{task.name}': init_head = '{task.init_head}', but {source} has no head "
                f"'{wanted}'{did_you_mean(wanted, names)}."
            )
        for key in ("head_features", "head_layers", "ensemble", "repulsion", "task_embedding"):
            there, here = getattr(start.settings, key), getattr(heads, key)
            if there != here:
                raise ConfigError(
                    f"task '{task.name}': the heads of {source} have model.{key} = {there!r}, the run "
                    f"file {here!r}; set the same."
                )


def rows_of(init_head: str, start: AtomisticModel) -> tuple[int, ...]:
    """Return the index of the head of a name; for 'mean', those of all heads."""
    names = [task.name for task in start.tasks]
    return tuple(range(len(names))) if init_head == MEAN and MEAN not in names else (names.index(init_head),)


def compare_heads(
    start: AtomisticModel, task: TaskSection, facts: TaskFacts, heads: Sequence[tuple[int, ...]]
) -> list[HeadErrors]:
    """Return the errors of heads, or of means of heads, on a sample of a task's structures, nearest first."""
    samples = spread_samples(task.location, start.settings.encoder.cutoff, COMPARED)
    found = []
    for rows in heads:
        bare = taken_over(task, facts, [start.tasks[row] for row in rows], {})
        found.append(head_errors(start, bare, rows, samples))
    return sorted(found, key=lambda errors: errors.order)


def head_starts(
    tasks: Sequence[TaskSection], facts: Sequence[TaskFacts], start: AtomisticModel, finetune: FinetuneSection
) -> list[HeadStart]:
    """Return how each task's head starts, given the facts that come from its shards.

    The heads of `start` predict training structures of the task. Raises ConfigError for labels that seem to be in
    another unit, unless `finetune.check_units` is off, and ShardError for damaged shards.
    """
    return [_head_start(task, own, start, finetune) for task, own in zip(tasks, facts, strict=True)]


def _head_start(task: TaskSection, own: TaskFacts, start: AtomisticModel, finetune: FinetuneSection) -> HeadStart:
    names = [each.name for each in start.tasks]
    same = (names.index(task.name),) if task.name in names else ()
    if not task.init_head:
        return HeadStart(rows=same, facts=own)
    said = unseen_warning(start, own, finetune.method)
    if task.init_head == NEW:
        return HeadStart(rows=(), facts=own, said=tuple(said))
    if task.init_head == OWN:
        # All facts are kept, whatever these structures hold: a part of the data must not remove elements.
        return HeadStart(rows=same, facts=start.tasks[names.index(task.name)])
    is_nearest = task.init_head == NEAREST and NEAREST not in names
    heads = [(row,) for row in range(len(names))] if is_nearest else [rows_of(task.init_head, start)]
    compared = compare_heads(start, task, own, heads)
    nearest = compared[0]
    rows = (names.index(nearest.name),) if is_nearest else heads[0]
    if is_nearest:
        said.append(f"task '{task.name}': the nearest head is '{nearest.name}' ({shown_errors(nearest)}).")
    if finetune.check_units:
        check_units(task, compared)
    return HeadStart(rows=rows, facts=refit(start, task, own, rows), said=tuple(said))


def check_units(task: TaskSection, heads: Sequence[HeadErrors]) -> None:
    """Raise ConfigError if labels seem to be in another unit than the predictions of heads.

    Of all heads that were compared and know the elements, the one decides whose predictions correlate best with the
    labels: labels in another unit are near to no head, and the nearest one is then whichever predicts large numbers.
    Energies are few numbers, which may all vary with the volume alone; if there are forces, only heads whose forces
    correlate are asked for energies.
    """
    knowing = [head for head in heads if not head.lacks]
    alike = [head for head in knowing if head.forces is None or abs(head.forces.correlation) >= ALIKE["forces"]]
    for what, found in (
        ("forces", [(head.forces, head.name) for head in knowing if head.forces is not None]),
        ("energies", [(head.energies, head.name) for head in alike if head.energies is not None]),
    ):
        likeness, name = max(found, key=lambda each: abs(each[0].correlation), default=(None, ""))
        if likeness is not None and (odd := suspicion(what, likeness)) is not None:
            raise ConfigError(
                f"task '{task.name}' {odd} (head '{name}'); convert again with the right [units], or set "
                "finetune.check_units = false if they are right."
            )


def refit(start: AtomisticModel, task: TaskSection, own: TaskFacts, rows: Sequence[int]) -> TaskFacts:
    """Return the facts of a task that starts as the mean of heads, with reference energies fitted again."""
    old = [start.tasks[row] for row in rows]
    bare = taken_over(task, own, old, {})
    before = old[0].reference_energies if len(old) == 1 else {}
    # An element that does not occur in the fit keeps its energy from the head, or else from the shards.
    references = {symbol: before.get(symbol, energy) for symbol, energy in own.reference_energies.items()}
    if own.has_energy:
        samples = spread_samples(task.location, start.settings.encoder.cutoff, FITTED)
        samples = [sample for sample in samples if sample.structure.energy is not None]
        left = [sample.structure.energy or 0.0 for sample in samples] - interactions(
            head_model(start, bare, rows), samples
        )
        references |= refitted(compositions_of(samples), left, before)
    return replace(bare, reference_energies=references)


def resumed_facts(tasks: Sequence[TaskSection], facts: Sequence[TaskFacts], run_dir: Path) -> list[TaskFacts]:
    """Return facts of tasks with what they took over from other heads when the run in `run_dir` was started."""
    stored = {table["name"]: task_facts_from(table) for table in read_run_json(run_dir, MODEL_FACTS_NAME)["tasks"]}
    resumed = []
    for task, own in zip(tasks, facts, strict=True):
        old = stored.get(task.name)
        if old is None or task.init_head in ("", NEW):
            resumed.append(own)
        else:
            resumed.append(old if task.init_head == OWN else taken_over(task, own, [old], old.reference_energies))
    return resumed


def taken_over(
    task: TaskSection, own: TaskFacts, heads: Sequence[TaskFacts], references: dict[str, float]
) -> TaskFacts:
    """Return the facts of a task whose head is the mean of others, such as their scale and how they predict forces.

    Charge and spin are inputs if they were inputs of the heads. What the run file sets for the task takes precedence.
    """
    forces, stress = _one([(head.forces, head.stress) for head in heads], (own.forces, own.stress))
    cannot = forces == NONE or (CONSERVATIVE in (forces, stress) and not own.has_energy)
    if task.forces is not None or task.stress is not None or cannot:
        forces, stress = own.forces, own.stress
    told = own.charge_spin or any(head.charge_spin for head in heads)
    return replace(
        own,
        reference_energies=references,
        scale=sum(head.scale for head in heads) / len(heads),
        forces=forces,
        stress=stress,
        charge_spin=told if task.charge_spin is None else task.charge_spin,
        targets={name: _target(facts, name, heads) for name, facts in own.targets.items()},
    )


def _one(values: Sequence[T], otherwise: T) -> T:
    """Return the value that all values have, or `otherwise` if they differ."""
    return values[0] if all(value == values[0] for value in values) else otherwise


def _target(own: TargetFacts, name: str, heads: Sequence[TaskFacts]) -> TargetFacts:
    """Return a target's facts with the mean and scale of the heads, if it is the same quantity in all of them."""
    theirs = [head.targets[name] for head in heads if name in head.targets]
    return _one(theirs, own) if theirs and theirs[0].form == own.form else own


def started_from(
    tasks: Sequence[TaskSection], start: AtomisticModel, rows: Mapping[int, Sequence[int]], source: str
) -> list[str]:
    """Return sentences for the log about the model that a run starts from, which was read from `source`."""
    names = [task.name for task in start.tasks]
    parts = []
    for index, task in enumerate(tasks):
        heads = [names[row] for row in rows.get(index, ())]
        if heads:
            shown = "the mean of all heads" if task.init_head == MEAN else f"head '{heads[0]}'"
            changed = "" if task.init_head in ("", OWN) else ", reference energies refitted"
            parts.append(f"task '{task.name}' as {shown}{changed}")
    return [f"started from {source}: {'; '.join(parts) or 'no head of it'}."]


def unseen_elements(start: AtomisticModel, facts: TaskFacts) -> list[str]:
    """Return the elements of a task that the starting model has not been trained on."""
    seen = {symbol for task in start.tasks for symbol in task.elements}
    return sorted(set(facts.elements) - seen)


def unseen_warning(start: AtomisticModel, facts: TaskFacts, method: str) -> list[str]:
    """Return a warning about elements of a task that the model has not been trained on, if there are any."""
    unseen = unseen_elements(start, facts)
    if not unseen:
        return []
    never = "" if method != HEADS else ", which finetune.method = 'heads' does not do; choose another one"
    return [
        f"warning: run.start_from was not trained on {', '.join(unseen)}, which task '{facts.name}' holds: the weights "
        f"of the encoder for it are random and must be learnt from these structures{never}."
    ]


def shown_errors(errors: HeadErrors) -> str:
    """Return a head's errors as a part of a sentence."""
    parts = []
    if errors.force_mae is not None:
        parts.append(f"forces {1000 * errors.force_mae:.1f} meV/Å")
    if errors.energy_mae is not None:
        parts.append(f"energies, with refitted references, {1000 * errors.energy_mae:.2f} meV/atom")
    return "mean absolute errors: " + ", ".join(parts) if parts else "no labels to compare"
