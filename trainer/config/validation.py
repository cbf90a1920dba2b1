"""Settings that need a validation loss, and whether the shards of a run give one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from hydrazero.models.task_facts import NONE, TaskFacts
from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.structure import Structure
from hydrazero.trainer.config.schedule_shapes import Plateau, own_shape
from hydrazero.trainer.config.sections import DataSection, LossSection, TaskSection, TrainSection


def needs_validation(train: TrainSection, ds_config: Mapping[str, Any]) -> str:
    """Return a setting that needs a validation loss, and what to set instead, as parts of a sentence; "" if none is."""
    if train.patience:
        return f"train.patience = {train.patience} needs a validation loss; set train.patience = 0"
    if isinstance(own_shape(dict(ds_config)), Plateau):
        return "deepspeed.scheduler.type = WarmupPlateauLR needs a validation loss; choose another schedule"
    if train.keep_best:
        return "train.keep_best = true needs a validation loss; set train.keep_best = false"
    return ""


def check_validation_split(needed: str, tasks: Sequence[TaskSection], manifests: Sequence[Manifest]) -> None:
    """Raise ConfigError if a setting needs a validation loss, and no task with a weight has validation structures.

    `needed` is the result of `needs_validation`.
    """
    counts = [manifest.structures("val") for task, manifest in zip(tasks, manifests, strict=True) if task.weight]
    if needed and not any(counts):
        raise ConfigError(
            f"{needed}, or convert with a fraction for val: no task with a weight above 0 has validation structures."
        )


def missing_split_warnings(tasks: Sequence[TaskSection], manifests: Sequence[Manifest]) -> list[str]:
    """Return a sentence for each task whose shards have no validation structures."""
    return [
        f"warning: task '{task.name}' has no validation structures: its errors are not shown during training."
        for task, manifest in zip(tasks, manifests, strict=True)
        if not manifest.structures("val")
    ]


def check_validation_labels(
    needed: str, loss: LossSection, data: DataSection, tasks: Sequence[TaskSection], known: Sequence[TaskFacts]
) -> None:
    """Raise ConfigError if a setting needs a validation loss, and no validation structure has a label that counts.

    Reads blocks until it finds such a label, usually the first. Blocks that cannot be read are left to the evaluation.
    """
    if not needed:
        return
    for task, facts in zip(tasks, known, strict=True):
        if task.weight and _has_label(BlockReader(data.folder(task), "val"), facts, loss):
            return
    raise ConfigError(
        f"{needed}, or convert again: no validation structure has a label that counts in the loss, with elements that "
        "its task's training structures contain."
    )


def _has_label(reader: BlockReader, facts: TaskFacts, loss: LossSection) -> bool:
    elements = [atomic_numbers[symbol] for symbol in facts.elements]
    for number in range(len(reader)):
        try:
            block = reader.read(number)
        except ShardError:
            return True
        structures = (block.structure(row) for row in range(len(block)))
        if any(_counts(one, facts, loss) and np.isin(one.numbers, elements).all() for one in structures):
            return True
    return False


def _counts(structure: Structure, facts: TaskFacts, loss: LossSection) -> bool:
    """Return whether a structure has a label that the task predicts, with a weight at the end of the run."""
    held = {
        "energy": structure.energy is not None,
        "forces": structure.forces is not None and facts.forces != NONE,
        "stress": structure.stress is not None and facts.stress != NONE and loss.stress_weight > 0,
        **{name: name in structure.targets or name in structure.atom_targets for name in facts.targets},
    }
    return any(found and loss.final_weight(name) for name, found in held.items())
