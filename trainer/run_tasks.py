"""The tasks of a run: their manifests, checked, and what the model has to know of them."""

from __future__ import annotations

from pathlib import Path

from hydrazero.models.atomistic import TaskFacts
from hydrazero.shards.budget import check_budget, degrees_within
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.location import is_remote
from hydrazero.shards.manifest import Manifest, check_shard_files, read_manifest
from hydrazero.trainer.config import RunConfig, TaskSection

SMALLEST_SCALE = 1e-3
"""eV/Å or eV per atom; a label's root mean square below it is rounding or a constant, not a scale."""


def task_manifest(task: TaskSection, config: RunConfig) -> Manifest:
    """Read a task's manifest; raises HydrazeroError if its shards are absent, damaged, empty, or too large to batch."""
    if not is_remote(task.shards) and not Path(task.shards).is_dir():
        raise ConfigError(f"task '{task.name}' has no shards: {task.shards} does not exist; run 'hydrazero convert'.")
    manifest = read_manifest(task.shards)
    if config.data.on_bad_shard == "stop":
        check_shard_files(manifest, task.shards)
    if manifest.structures("train") == 0:
        raise ConfigError(f"task '{task.name}': {task.shards} holds no training structures.")
    check_budget(task.name, manifest, config.batch, config.model.cutoff)
    return manifest


def budget_warning(name: str, manifest: Manifest, cutoff: float) -> str | None:
    """Say that the manifest cannot tell whether all structures fit a batch, if it cannot."""
    if degrees_within(manifest, cutoff) is not None:
        return None
    return (
        f"warning: the shards of task '{name}' have no counts of neighbours within {cutoff:g} Å; a structure too dense "
        f"for a batch will stop the run when it comes (convert with degree_cutoffs = [{cutoff:g}] to know before)."
    )


def task_facts(name: str, manifest: Manifest) -> TaskFacts:
    """Return what the model and its users need to know of a task."""
    scales = [
        manifest.labels[label].rms for label in ("forces", "energy_residual_per_atom") if label in manifest.labels
    ]
    return TaskFacts(
        name=name,
        reference_energies=manifest.reference_energies,
        # Labels that vanish by symmetry are no scale; with none left, eV and Å do.
        scale=next((scale for scale in scales if scale > SMALLEST_SCALE), 1.0),
        elements=manifest.trained_elements,
        fidelity=manifest.source.get("method", ""),
        has_forces="forces" in manifest.labels,
    )


def charge_warning(name: str, manifest: Manifest) -> str | None:
    """Say that the model cannot tell a task's charged or open-shell structures from others, if it has any."""
    charged, total = manifest.charged_structures, manifest.structures()
    if not charged:
        return None
    return (
        f"warning: task '{name}' has {charged:,} of {total:,} structures with a charge or an open shell; the model "
        "sees neither, so one geometry in two such states gets one energy."
    )
