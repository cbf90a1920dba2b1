"""A batch for given shards and a given model: as large as requested, if memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.models.model_settings import ModelSettings
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.stream.batch_proposal import Demand, Fill, demand_of, fill_of, propose, simulate
from hydrazero.shards.stream.stream import SplitReader, StreamSettings
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.cost.step_memory import SHARE, StepMemory, memory_at_hand


@dataclass(frozen=True, kw_only=True)
class ProposedBatch:
    """A batch, and what is known about it."""

    structures: int
    """Mean number of structures in a batch."""
    shape: BatchShape
    """Size of the batch."""
    fill: Fill
    """How full simulated batches of this shape are."""
    step_bytes: float
    """Memory that a training step needs with this batch."""
    available_bytes: float
    """Memory that is available for it."""

    def text(self, model: ModelSettings) -> str:
        """Return a section [batch] of a run file, with comments."""
        encoder, shape = model.encoder, self.shape
        maximum = int(self.structures * self.available_bytes / self.step_bytes)
        name = f"{encoder.encoder}, {encoder.features} features, {encoder.layers} layers"
        return (
            f"[batch]  # about {self.structures} structures; neighbours within {encoder.cutoff:g} Å\n"
            f"structures = {shape.structures}\natoms = {shape.atoms}\nslots = {shape.slots}\nedges = {shape.edges}\n"
            f"# fills {self.fill.atoms:.1%} of the atoms and {self.fill.slots:.1%} of the slots; the fullest batch has "
            f"{self.fill.edges_spread:.3f} times the mean number of edges\n"
            f"# a training step needs about {self.step_bytes / 1e9:.2f} GB ({name}); "
            f"{self.available_bytes / 1e9:.1f} GB are enough for about {maximum:,} structures"
        )


def propose_batch(
    folders: Sequence[Path],
    model: ModelSettings,
    structures: int,
    *,
    temperature: float = 1.0,
    available: float,
    smaller: bool = False,
) -> ProposedBatch:
    """Return a batch of about `structures` structures for the training splits of shard folders.

    `available` is the memory in bytes that a step may take. If a batch needs more, raise ConfigError, or, if `smaller`
    is set, halve the number of structures until it fits or is one. Raises ShardError for damaged shards.
    """
    stream = StreamSettings(
        folders=tuple(str(folder) for folder in folders),
        cutoff=model.encoder.cutoff,
        shape=BatchShape(structures=1, atoms=1, slots=ROW_SLOTS),  # has no influence on the samples that are read
        temperature=temperature,
    )
    reader = SplitReader(stream, "train")
    demand, memory = demand_of(reader), StepMemory(model)
    if smaller:
        structures, shape = fitting_batch(reader, demand, memory, structures, available)
    else:
        shape = propose(demand, reader, structures)
    needed = memory.bytes_of(shape)
    if needed > available:
        raise ConfigError(
            f"a batch of about {structures} structures needs {needed / 1e9:.1f} GB in a training step, but only "
            f"{available / 1e9:.1f} GB are available; ask for fewer --structures, or use a smaller model or cutoff."
        )
    return ProposedBatch(
        structures=structures,
        shape=shape,
        fill=fill_of(simulate(demand, shape, np.random.default_rng(0)), shape),
        step_bytes=needed,
        available_bytes=available,
    )


def fitting_batch(
    reader: SplitReader, demand: Demand, memory: StepMemory, structures: int, available: float
) -> tuple[int, BatchShape]:
    """Return a batch whose training step fits into `available` bytes, with its mean number of structures.

    The number of structures is halved until the batch fits, or until it is one, whether that fits or not.
    """
    shape = propose(demand, reader, structures)
    while structures > 1 and memory.bytes_of(shape) > available:
        structures //= 2
        shape = propose(demand, reader, structures)
    return structures, shape


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """The options of `hydrazero inspect --propose-batch`."""

    folders: tuple[Path, ...]
    """Shard folders."""
    cutoff: float
    """Å; that of the run file, if there is one."""
    structures: int
    """Mean number of structures in a batch."""
    temperature: float
    """data.temperature of the run."""
    memory: float | None
    """Memory of a rank in GB; None: what is free on this machine."""
    run_file: Path | None
    """Run file whose model is used; None: the default model."""


def batch_text(request: BatchRequest) -> str:
    """Return a section [batch] for a run file, with comments; raises ConfigError and ShardError."""
    if request.structures < 1:
        raise ConfigError(f"--structures is {request.structures}; it must be at least 1.")
    if not 0 < request.cutoff < float("inf"):
        raise ConfigError(f"--cutoff is {request.cutoff:g}; it must be a distance in Å above 0.")
    if not 1 <= request.temperature < float("inf"):
        raise ConfigError(f"--temperature is {request.temperature:g}; it must be a number of at least 1.")
    model = ModelSettings(encoder=EncoderSettings(cutoff=request.cutoff))
    if request.run_file is not None:
        model = load_run_config(request.run_file).model.settings()
    available = SHARE * (memory_at_hand(1) if request.memory is None else request.memory * 1e9)
    proposed = propose_batch(
        request.folders, model, request.structures, temperature=request.temperature, available=available
    )
    return proposed.text(model)
