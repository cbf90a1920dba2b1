"""The data of a planned run: from manifests if the shards exist, otherwise from presets and the run file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hydrazero.launch.job.site_file import FilesSection
from hydrazero.shards.block import BLOCK_STRUCTURES
from hydrazero.shards.convert.presets import load_preset, preset_names
from hydrazero.shards.convert.settings import SplitSection
from hydrazero.shards.convert.writer import BLOCKS_PER_SHARD
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.location import is_remote
from hydrazero.shards.manifest import read_manifest
from hydrazero.shards.stream.deal import Deal, TaskPlan, mixture_repeats
from hydrazero.trainer.config.sections import PlanSection, TaskSection

BYTES_OF_ATOM, BYTES_OF_STRUCTURE = 25.0, 110.0
"""Bytes on disk per atom and per structure: a linear fit to the shards of the sixteen real tasks."""
MANIFEST_BYTES = 45.0
"""Bytes of one block in a manifest (measured)."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The training data of a task."""

    name: str
    structures: int
    """Number of training structures."""
    in_all: int
    """Number of structures of all splits together."""
    atoms: float
    """Mean number of atoms of a structure."""
    source: str
    """Where the numbers come from."""

    @property
    def bytes(self) -> float:
        """Bytes of the training shards."""
        return self.structures * self._bytes_each

    @property
    def bytes_in_all(self) -> float:
        """Bytes of the shards of all splits."""
        return self.in_all * self._bytes_each

    @property
    def _bytes_each(self) -> float:
        return BYTES_OF_STRUCTURE + BYTES_OF_ATOM * self.atoms

    @property
    def blocks(self) -> int:
        """Number of blocks of the training split."""
        return -(-self.structures // BLOCK_STRUCTURES)

    @property
    def shards(self) -> int:
        """Number of files of the training split."""
        return -(-self.blocks // BLOCKS_PER_SHARD)


def planned_data(tasks: Sequence[TaskSection], section: PlanSection) -> list[TaskData]:
    """Return what is known about the data of each task; raise ConfigError if too little is known about one."""
    unknown = sorted({*section.structures, *section.atoms} - {task.name for task in tasks})
    if unknown:
        raise ConfigError(f"plan: '{unknown[0]}' is not a task of the run file.")
    return [_data_of(task, section) for task in tasks]


def _data_of(task: TaskSection, section: PlanSection) -> TaskData:
    if not is_remote(task.location) and (Path(task.shards) / "manifest.json").is_file():
        manifest = read_manifest(task.shards)
        count = manifest.structures("train")
        if not count:
            raise ConfigError(f"task '{task.name}': {task.shards} holds no training structures; leave the task out.")
        atoms = manifest.atoms("train") / count
        in_all = sum(manifest.structures(split) for split in manifest.splits)
        return TaskData(name=task.name, structures=count, in_all=in_all, atoms=atoms, source="its manifest")
    preset = load_preset(task.name) if task.name in preset_names() else None
    share = SplitSection().train if preset is None else preset.table.get("split", {}).get("train", SplitSection().train)
    count, source = section.structures.get(task.name, 0), "the run file"
    if not count and preset is not None and preset.about.structures:
        count, source = int(preset.about.structures * share), "its preset"
    atoms = section.atoms.get(task.name, 0.0)
    if not count or not atoms:
        what = "atoms" if count else "structures"
        raise ConfigError(
            f"task '{task.name}': {task.shards} has no manifest yet; give the number of {what} in the run file: "
            f"[plan.{what}] {task.name} = ..."
        )
    return TaskData(name=task.name, structures=count, in_all=round(count / share), atoms=atoms, source=source)


@dataclass(frozen=True, kw_only=True)
class EpochReads:
    """What the data-loading processes of all ranks read from the file system in an epoch."""

    structures: float
    """Number of structures."""
    bytes: float
    """Bytes read; a block that is divided among workers is read completely by each of them."""
    blocks: float
    """Number of reads, each of which opens a shard."""
    shards: int
    """Total number of shards."""
    manifest_bytes: float
    """Bytes of all manifests."""


def epoch_reads(data: Sequence[TaskData], temperature: float, shares: Sequence[float | None], lanes: int) -> EpochReads:
    """Return what `lanes` data-loading processes, those of all ranks together, read in an epoch."""
    repeats = mixture_repeats([task.structures for task in data], temperature, shares)
    bytes_read = blocks = structures = 0.0
    for task, passes in zip(data, repeats, strict=True):
        sizes = np.full(task.blocks, BLOCK_STRUCTURES, dtype=np.int64)
        parts = Deal([TaskPlan(name=task.name, block_sizes=sizes)], lanes=lanes, seed=0).parts[0]
        structures += passes * task.structures
        blocks += passes * task.blocks * parts
        bytes_read += passes * task.bytes * parts
    return EpochReads(
        structures=structures,
        bytes=bytes_read,
        blocks=blocks,
        shards=sum(task.shards for task in data),
        manifest_bytes=sum(task.blocks * MANIFEST_BYTES for task in data),
    )


def copying_seconds(data: Sequence[TaskData], nodes: int, files: FilesSection) -> float:
    """Return the seconds in which all nodes copy all shards to their own disks at the same time (`copy_shards`).

    The slowest of three limits decides: the bandwidth of the file system, the files that it opens per second, and the
    bandwidth at which a node writes, if that is known.
    """
    size = sum(task.bytes_in_all for task in data)
    count = sum(task.shards * task.in_all / max(task.structures, 1) for task in data)
    writing = 0.0 if files.node_local_write is None else size / files.node_local_write.value
    return max(nodes * size / files.bandwidth.value, nodes * count / files.opens.value, writing)


def mean_atoms(data: Sequence[TaskData], temperature: float, shares: Sequence[float | None]) -> float:
    """Return the mean number of atoms of a structure in the mixture of tasks that is trained on."""
    repeats = mixture_repeats([task.structures for task in data], temperature, shares)
    drawn = [passes * task.structures for task, passes in zip(data, repeats, strict=True)]
    return sum(n * task.atoms for n, task in zip(drawn, data, strict=True)) / sum(drawn)
