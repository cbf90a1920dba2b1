"""Estimate the memory that a run takes on each rank, and compare it with the memory that is free."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from hydrazero.models.model_settings import ModelSettings
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.stream.budget import degrees_within
from hydrazero.trainer.cost.step_memory import StepMemory, memory_at_hand
from hydrazero.trainer.ranks.distributed import gather_objects


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """Memory of each rank in bytes."""

    step: float
    """Peak memory of a training step with a full batch."""
    states: float
    """Memory of weights, gradients, optimizer states and the moving average."""
    at_hand: float
    """Free memory of the rank that has least."""

    @property
    def needed(self) -> float:
        """Sum of what the run takes."""
        return self.step + self.states


def megabytes(count: float) -> str:
    """Return a number of bytes as text in MB."""
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def memory_of_ranks() -> int:
    """Return the free memory of the rank that has least, in bytes; called on every rank."""
    hosts = gather_objects(socket.gethostname())
    return min(gather_objects(memory_at_hand(hosts.count(socket.gethostname()))))


def check_memory(memory: RunMemory, shape: BatchShape, cutoff: float, manifests: Sequence[Manifest]) -> None:
    """Raise ConfigError, with a batch that would fit, if a run takes more memory than is free."""
    if memory.needed <= memory.at_hand:
        return
    taken = f"the run takes about {megabytes(memory.needed)} on each rank, and {megabytes(memory.at_hand)} are free"
    room = (memory.at_hand - memory.states) / memory.step
    fitting = scaled(shape, room)
    if room <= 0 or not holds_all(fitting, cutoff, manifests):
        raise ConfigError(
            f"{taken}; no batch that holds the largest structure would fit: take a smaller model or cutoff, more "
            "memory, or a ZeRO stage that divides more (deepspeed.config)."
        )
    raise ConfigError(
        f"{taken}; a batch of structures = {fitting.structures}, atoms = {fitting.atoms}, slots = {fitting.slots}, "
        f"edges = {fitting.edges} would fit ([batch]), or a smaller model or cutoff."
    )


def scaled(shape: BatchShape, room: float) -> BatchShape:
    """Return a batch that takes the fraction `room` of the memory of another."""
    changes = {
        "structures": max(int(shape.structures * room), 1),
        "atoms": int(shape.atoms * room),
        "slots": int(shape.rows * room) * ROW_SLOTS,
        "edges": int(shape.edges * room),
    }
    return shape.model_copy(update=changes)


def holds_all(shape: BatchShape, cutoff: float, manifests: Sequence[Manifest]) -> bool:
    """Return whether a batch holds the largest structures, as far as the manifests know."""
    for manifest in manifests:
        found = degrees_within(manifest, cutoff)
        if manifest.max_atoms > shape.atoms:
            return False
        if found is not None and (found[1].most_slots > shape.slots or found[1].most_edges > shape.most_edges):
            return False
    return True


def step_bytes(settings: ModelSettings, shape: BatchShape) -> float:
    """Return the peak memory of a training step in bytes."""
    return StepMemory(settings).bytes_of(shape)
