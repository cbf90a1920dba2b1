"""From sources to batches: worker processes read structures, find neighbours and pack batches while the model runs."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from ase.symbols import Symbols
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hydrazero.models.screening.relaxation import Relaxer
from hydrazero.models.screening.samples import BatchRows, RejectedStructureError, Rejection, SampleBuilder
from hydrazero.models.screening.settings import CHUNK
from hydrazero.models.screening.sources import Item, Items, Source, all_items
from hydrazero.shards.device import has_gpu
from hydrazero.shards.errors import HydrazeroError, StructureError
from hydrazero.shards.graphs.graph import BatchShape, GraphSample, collate, shape_holding
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.processes import end_with_creator
from hydrazero.shards.stream.batch_buffer import BatchBuffer, shared_bytes, to_buffer
from hydrazero.shards.stream.packing import Packer, fits
from hydrazero.shards.stream.shared_memory import POLL, check_shared_memory, outputs_of, ready_to_pass

SAMPLED_STRUCTURES, SAMPLED_SOURCES = 64, 64
"""Maximum number of structures per source, and of sources, from which the shape of batches is estimated."""
PREFETCH = 4
"""Number of batches that each worker prepares in advance."""
WITHOUT_WORKERS = "--workers 0"
"""Option with which no process but that of the rank reads."""


@dataclass(kw_only=True)
class WorkerOutput:
    """What a worker passes to the rank at a time: at most one batch, rejected structures and chunks read to the end."""

    batch: BatchBuffer | None = None
    rows: BatchRows | None = None
    usual: bool = True
    """Whether the batch has the shape of most batches."""
    rejected: list[Rejection] = field(default_factory=list)
    chunk_sizes: dict[int, int] = field(default_factory=dict)
    """Number of structures of each chunk that has been read to its end."""
    total: int | None = None
    """Number of structures in all sources, once it is known."""
    error: str = ""
    """The error that stops the worker, as a sentence; empty if there is none."""

    def pin_memory(self) -> WorkerOutput:
        """Move the batch to pinned memory, from which a GPU reads faster; the DataLoader calls this."""
        self.batch = None if self.batch is None else self.batch.pin_memory()
        return self


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """The share of a screen that one rank computes."""

    rank: int = 0
    ranks: int = 1
    done: frozenset[int] = frozenset()
    """Chunks that are in parts already."""


class ScreenDataset(IterableDataset):  # type: ignore[type-arg]
    """The chunks of one rank as batches; with W workers, each reads every W-th of the rank's chunks."""

    def __init__(self, sources: Sequence[Source], builder: SampleBuilder, shape: BatchShape, share: RankShare) -> None:
        self.sources, self.builder, self.shape, self.share = sources, builder, shape, share
        self.relaxer: Relaxer | None = None
        self._total = 0
        self._ended: dict[int, int] = {}

    def __iter__(self) -> Iterator[WorkerOutput]:
        # An exception would reach the user as the DataLoader's traceback, not as a sentence.
        try:
            yield from self._outputs()
        except HydrazeroError as error:
            yield WorkerOutput(error=str(error))
        except OSError as error:
            where = error.filename or "a source"
            yield WorkerOutput(
                error=f"{where} cannot be read ({error.strerror or error}); start again once it can be read."
            )

    def _outputs(self) -> Iterator[WorkerOutput]:
        packer, output, names = Packer(self.shape), WorkerOutput(), dict[int, str]()
        for item in self._items():
            output.chunk_sizes |= self._ended
            self._ended = {}
            try:
                sample = self.builder.sample(item)
            except StructureError as error:
                output.rejected.append(_rejection(item, error))
                if len(output.rejected) >= CHUNK:
                    yield output
                    output = WorkerOutput()
                continue
            names[item.index] = item.source_id
            if not fits(sample, self.shape):
                yield self._with_batch(output, [sample], names, usual=False)
                output = WorkerOutput()
                continue
            packer.add(sample)
            while (packed := packer.pop_full()) is not None:
                yield self._with_batch(output, packed, names)
                output = WorkerOutput()
        output.chunk_sizes |= self._ended
        while (packed := packer.pop_any()) is not None:
            yield self._with_batch(output, packed, names)
            output = WorkerOutput()
        output.total = self._total
        yield output

    def _items(self) -> Iterator[Item]:
        """Yield the items of the chunks of this worker that are not done yet."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader, readers = self.share.rank * workers + worker, self.share.ranks * workers
        done = self.share.done
        items = all_items(self.sources, lambda chunk: chunk % readers == reader and chunk not in done)
        counted = self._counted(items)
        yield from counted if self.relaxer is None else self.relaxer.items(counted)

    def _counted(self, items: Items) -> Iterator[Item]:
        """Pass items on, and record the number of items of each chunk that has ended."""
        chunk, count = -1, 0
        while True:
            try:
                item = next(items)
            except StopIteration as end:
                self._total = end.value
                break
            if item.index // CHUNK != chunk and chunk >= 0:
                self._ended[chunk], count = count, 0
            chunk, count = item.index // CHUNK, count + 1
            yield item
        if chunk >= 0:
            self._ended[chunk] = count

    def _with_batch(
        self, output: WorkerOutput, packed: list[GraphSample], names: dict[int, str], usual: bool = True
    ) -> WorkerOutput:
        shape = self.shape if usual else shape_holding(packed)
        batch = collate(packed, shape, self.builder.potential.model.dtype)
        del batch.names
        if self.builder.rows_per_atom is not None:
            batch.pbc = torch.zeros(shape.structures, 3, dtype=torch.bool)
            batch.pbc[: len(packed)] = torch.from_numpy(np.stack([sample.structure.pbc for sample in packed]))
        output.batch = ready_to_pass(to_buffer(batch), WITHOUT_WORKERS)
        output.rows, output.usual = self.builder.rows(packed, names), usual
        return output


def _rejection(item: Item, error: StructureError) -> Rejection:
    structure = error.structure if isinstance(error, RejectedStructureError) else None
    return Rejection(
        index=item.index,
        source_id=item.source_id,
        formula="" if structure is None else str(Symbols(structure.numbers).get_chemical_formula()),
        atoms=0 if structure is None else len(structure),
        kind=error.reason,
        reason=str(error),
    )


def shape_for_screen(sources: Sequence[Source], builder: SampleBuilder, atoms: int) -> BatchShape:
    """Estimate the shape of batches of about `atoms` atoms from the first structures of some sources."""
    samples = []
    for source in sources[:: math.ceil(len(sources) / SAMPLED_SOURCES) or 1]:
        good = 0
        for item in islice(source.items(0, lambda chunk: True), CHUNK):
            try:
                samples.append(builder.sample(item))
            except StructureError:
                continue
            good += 1
            if good == SAMPLED_STRUCTURES:
                break
    if not samples:
        return BatchShape(structures=atoms, atoms=atoms, slots=2 * ROW_SLOTS * atoms)
    sizes = np.array([len(sample.structure) for sample in samples])
    rows = np.array([sample.rows for sample in samples])
    # Structures far larger than the median get batches of their own, for which memory may suffice.
    atoms = max(atoms, math.ceil(np.median(sizes)))
    return BatchShape(
        structures=math.ceil(1.25 * atoms / sizes.mean()),
        atoms=atoms,
        slots=max(math.ceil(atoms * rows.sum() / sizes.sum()), 1) * ROW_SLOTS,
    )


def worker_outputs(dataset: ScreenDataset, workers: int) -> Iterator[WorkerOutput]:
    """Yield the outputs of a rank's workers; with 0 workers, this process reads.

    Raises ConfigError if shared memory is too small for their batches.
    """
    needed = 0
    if workers:
        size = shared_bytes(collate([], dataset.shape, dataset.builder.potential.model.dtype))
        needed = workers * (PREFETCH + 1) * size
        check_shared_memory(needed, WITHOUT_WORKERS)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_end_with_the_rank,
        timeout=POLL if workers else 0,
        pin_memory=has_gpu(),
    )
    yield from outputs_of(loader, needed, WITHOUT_WORKERS)


def _end_with_the_rank(worker: int) -> None:
    """Let a worker ignore Ctrl-C, which every process receives, and end when the process of its rank ends.

    Otherwise a worker whose rank was killed would wait for ever to pass a batch on, and hold the rank's lock.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_creator()
