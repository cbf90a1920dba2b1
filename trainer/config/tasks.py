"""The tasks of a run: their manifests, checked, and what the model has to know about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydrazero.models.task_facts import CONSERVATIVE, DIRECT, NONE, TargetFacts, TaskFacts
from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.location import is_remote
from hydrazero.shards.manifest import Manifest, check_shard_files, read_manifest
from hydrazero.shards.stream.budget import check_budget, may_exceed
from hydrazero.shards.targets import TargetStatistics
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.config.sections import LOSS_PARTS, DataSection, LossSection, TaskSection

SMALLEST_SCALE = 1e-3
"""Smallest root mean square of labels, eV/Å or eV per atom, that is a scale and not rounding or a constant."""

SMALLEST_STRESS = 1e-6
"""Smallest root mean square of stress, eV/Å³, that is a scale."""

CONSTANT = 1e-6
"""A target whose deviation divided by its largest label is smaller than this is a constant."""


def task_manifests(config: RunConfig) -> tuple[Manifest, ...]:
    """Read the manifests of all tasks; raise HydrazeroError as `task_manifest` does."""
    cutoff = config.model.cutoff
    return tuple(task_manifest(task, config.data, config.batch, cutoff) for task in config.tasks)


def check_copies(tasks: Sequence[TaskSection], data: DataSection, manifests: Sequence[Manifest]) -> None:
    """Raise ShardError if a copy of shards on this node's local disk, which no other rank has read, is incomplete."""
    if data.copies and data.on_bad_shard == "stop":
        for task, manifest in zip(tasks, manifests, strict=True):
            check_shard_files(manifest, data.folder(task))


def task_manifest(task: TaskSection, data: DataSection, shape: BatchShape, cutoff: float) -> Manifest:
    """Read a task's manifest.

    Raises HydrazeroError if its shards are absent, damaged or empty, or hold a structure that no batch of `shape` holds
    with its neighbours within `cutoff` Å.
    """
    shards = data.folder(task)
    if not is_remote(shards) and not Path(str(shards)).is_dir():
        raise ConfigError(f"task '{task.name}' has no shards: {shards} does not exist; run 'hydrazero convert'.")
    manifest = read_manifest(shards)
    if data.on_bad_shard == "stop":
        check_shard_files(manifest, shards)
    if manifest.structures("train") == 0:
        raise ConfigError(f"task '{task.name}': {task.shards} holds no training structures.")
    check_budget(task.name, manifest, shape, cutoff)
    return manifest


def budget_warning(name: str, manifest: Manifest, shape: BatchShape, cutoff: float) -> str | None:
    """Return a warning if the manifest does not tell whether all structures fit into a batch."""
    if not may_exceed(manifest, shape, cutoff):
        return None
    return (
        f"warning: the shards of task '{name}' have no counts of neighbours within {cutoff:g} Å; a structure too dense "
        f"for a batch will stop the run when it is read (convert with degree_cutoffs = [{cutoff:g}] to know earlier)."
    )


def cutoff_warning(name: str, manifest: Manifest, cutoff: float) -> str | None:
    """Return a warning if no atom of the training split has a neighbour within the cutoff, in Å."""
    if not manifest.closest_within:
        return None
    nearest = min(manifest.closest.values(), default=manifest.closest_within)
    if nearest < cutoff:
        return None
    return (
        f"warning: no two atoms that task '{name}' trains on are closer than {nearest:.2f} Å, so that with "
        f"model.cutoff = {cutoff:g} its atoms have no neighbours; choose a longer cutoff."
    )


def task_facts(task: TaskSection, manifest: Manifest) -> TaskFacts:
    """Return what the model and its users need to know about a task; raise ConfigError for labels that are missing."""
    scales = [
        manifest.labels[label].rms for label in ("forces", "energy_residual_per_atom") if label in manifest.labels
    ]
    has_energy, has_forces = "energy_per_atom" in manifest.labels, "forces" in manifest.labels
    forces = task.forces or (CONSERVATIVE if has_energy else DIRECT if has_forces else NONE)
    stress = task.stress or forces
    if task.forces == DIRECT and not has_forces:
        raise ConfigError(f"task '{task.name}': forces = 'direct', but {task.shards} holds no forces to learn from.")
    if task.stress is None and stress == DIRECT and "stress" not in manifest.labels:
        stress = NONE
    if task.stress == DIRECT and "stress" not in manifest.labels:
        raise ConfigError(f"task '{task.name}': stress = 'direct', but {task.shards} holds no stress to learn from.")
    return TaskFacts(
        name=task.name,
        reference_energies=manifest.reference_energies,
        # Labels that vanish by symmetry give no scale; without any, the scale is 1 eV/Å.
        scale=next((scale for scale in scales if scale > SMALLEST_SCALE), 1.0),
        elements=manifest.trained_elements,
        fidelity=manifest.source.get("method", ""),
        has_energy=has_energy,
        has_forces=has_forces,
        has_stress=_stress_scale(manifest) != 1.0,
        undetermined_sums=manifest.undetermined_sums,
        forces=forces,
        stress=stress,
        stress_scale=_stress_scale(manifest),
        charge_spin=bool(manifest.charged_structures) if task.charge_spin is None else task.charge_spin,
        multiplicity_known=manifest.multiplicity_known == manifest.structures(),
        targets=_targets(task, manifest),
        closest=manifest.closest,
        closest_within=manifest.closest_within,
    )


def _stress_scale(manifest: Manifest) -> float:
    """Return the typical stress in eV/Å³; 1 if there are no labels, or none that differ from zero."""
    rms = manifest.labels["stress"].rms if "stress" in manifest.labels else 0.0
    return rms if rms > SMALLEST_STRESS else 1.0


def _targets(task: TaskSection, manifest: Manifest) -> dict[str, TargetFacts]:
    """Return the targets of a task that are trained; raise ConfigError for one that no structure has."""
    held = manifest.targets
    wanted = list(held) if task.targets is None else task.targets
    for name in wanted:
        if name not in held:
            raise ConfigError(
                f"task '{task.name}': no training structure in {task.shards} has the target "
                f"'{name}'{did_you_mean(name, list(held))}; name it in [targets] when converting, or leave it out."
            )
    return {
        name: TargetFacts(
            of=held[name].of,
            kind=held[name].kind,
            unit=held[name].unit,
            extensive=held[name].extensive,
            mean=held[name].mean,
            scale=_target_scale(held[name]),
        )
        for name in wanted
    }


def _target_scale(held: TargetStatistics) -> float:
    """Return the deviation of a target's labels, or 1 if the target is a constant except for rounding."""
    largest = max(abs(held.mean), abs(held.minimum), abs(held.maximum))
    return held.deviation if held.deviation > CONSTANT * largest else 1.0


def check_weights(loss: LossSection, facts: Sequence[TaskFacts]) -> None:
    """Raise ConfigError for the weight of a target on which no task is trained."""
    known = sorted({name for task in facts for name in task.targets})
    for name in loss.target_weights:
        if name not in known:
            raise ConfigError(f"loss.target_weights: '{name}' is no target of any task{did_you_mean(name, known)}.")
    parts = [*LOSS_PARTS, *known]
    for name in loss.final_weights:
        if name not in parts:
            raise ConfigError(
                f"loss.final_weights: '{name}' is neither energy, forces, stress, spread nor a target of any "
                f"task{did_you_mean(name, parts)}."
            )


def check_labels(task: TaskSection, loss: LossSection, facts: TaskFacts, manifest: Manifest) -> None:
    """Raise ConfigError if a task has a weight, but none of its labels is trained."""
    held = {
        "energy": facts.has_energy,
        "forces": facts.has_forces and facts.forces != NONE,
        "stress": "stress" in manifest.labels and facts.stress != NONE,
        **dict.fromkeys(facts.targets, True),
    }
    counted = [name for name, found in held.items() if found and (loss.weight(name) or loss.final_weight(name))]
    if task.weight and not counted:
        labels = ", ".join(sorted({*map(_label_name, manifest.labels), *manifest.targets})) or "no labels"
        raise ConfigError(
            f"task '{task.name}' trains nothing: of what {task.shards} holds ({labels}), nothing is predicted with a "
            "weight above 0; look at [loss] and at the task's forces, stress and targets, or set its weight to 0."
        )


def _label_name(statistics: str) -> str:
    """Return the label that an entry of the manifest's statistics belongs to, such as 'energy_residual_per_atom'."""
    return statistics.partition("_")[0]


def charge_warning(facts: TaskFacts, manifest: Manifest) -> str | None:
    """Return a warning if a task has charged or open-shell structures that the model cannot distinguish from others."""
    charged, total = manifest.charged_structures, manifest.structures()
    if not charged or facts.charge_spin:
        return None
    return (
        f"warning: task '{facts.name}' has {charged:,} of {total:,} structures with a charge or an open shell; with "
        "charge_spin = false the model sees neither, so one geometry has the same energy in all states."
    )
