"""From sources to batches: worker processes read, find neighbours, pack and lay out, while the model computes."""

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

from hydrazero.models.screening.lookup import Lookup, Refused, Rows, TooStrange
from hydrazero.models.screening.relaxed import Relaxer
from hydrazero.models.screening.settings import CHUNK
from hydrazero.models.screening.sources import Item, Items, Source, walk
from hydrazero.shards.device import has_gpu
from hydrazero.shards.errors import HydrazeroError, StructureError
from hydrazero.shards.graphs.graph import BatchShape, GraphSample, collate, shape_holding
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.processes import end_with_creator
from hydrazero.shards.stream.batch_buffer import BatchBuffer, to_buffer
from hydrazero.shards.stream.packing import Packer, fits

LOOKED_AT, SOURCES = 64, 64
"""Structures of a source, and sources, that the shape of batches is worked out from at most."""
PREFETCHED = 4
"""Batches that each worker may be ahead."""


@dataclass(kw_only=True)
class Screenful:
    """What a worker hands over: a batch or none, and news of its chunks."""

    batch: BatchBuffer | None = None
    rows: Rows | None = None
    usual: bool = True
    """Whether the batch has the shape that most have."""
    refused: list[Refused] = field(default_factory=list)
    finished: dict[int, int] = field(default_factory=dict)
    """Chunk that has been read to its end -> its number of structures."""
    total: int | None = None
    """Number of structures in all sources, once it is known."""
    fault: str = ""
    """What keeps the worker from going on, a sentence."""

    def pin_memory(self) -> Screenful:
        """Copy the batch to where a GPU reads it fast; the DataLoader asks for it."""
        self.batch = None if self.batch is None else self.batch.pin_memory()
        return self


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank has to do."""

    rank: int = 0
    ranks: int = 1
    done: frozenset[int] = frozenset()
    """Chunks that were done before."""


class Lane(IterableDataset):  # type: ignore[type-arg]
    """The chunks of one rank; each worker of a DataLoader takes every so many of them."""

    def __init__(self, sources: Sequence[Source], lookup: Lookup, shape: BatchShape, share: Share) -> None:
        self.sources, self.lookup, self.shape, self.share = sources, lookup, shape, share
        self.relaxer: Relaxer | None = None
        self._total = 0
        self._ended: dict[int, int] = {}

    def __iter__(self) -> Iterator[Screenful]:
        try:
            yield from self._screenfuls()
        except HydrazeroError as error:  # which a DataLoader would pass on with all that led to it
            yield Screenful(fault=str(error))
        except OSError as error:
            where = error.filename or "a source"
            yield Screenful(fault=f"{where} cannot be read ({error.strerror or error}); start again when it can.")

    def _screenfuls(self) -> Iterator[Screenful]:
        packer, news, names = Packer(self.shape), Screenful(), dict[int, str]()
        for item in self._items():
            news.finished |= self._ended
            self._ended = {}
            try:
                sample = self.lookup.sample(item)
            except StructureError as error:
                news.refused.append(_refused(item, error))
                if len(news.refused) >= CHUNK:
                    yield news
                    news = Screenful()
                continue
            names[item.index] = item.source_id
            if not fits(sample, self.shape):
                yield self._with_batch(news, [sample], names, usual=False)
                news = Screenful()
                continue
            packer.add(sample)
            while (packed := packer.pop_full()) is not None:
                yield self._with_batch(news, packed, names)
                news = Screenful()
        news.finished |= self._ended
        while (packed := packer.pop_any()) is not None:
            yield self._with_batch(news, packed, names)
            news = Screenful()
        news.total = self._total
        yield news

    def _items(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        lane, lanes = self.share.rank * workers + worker, self.share.ranks * workers
        done = self.share.done
        items = walk(self.sources, lambda chunk: chunk % lanes == lane and chunk not in done)
        counted = self._counted(items)
        yield from counted if self.relaxer is None else self.relaxer.items(counted)

    def _counted(self, items: Items) -> Iterator[Item]:
        """Pass items on, and note which chunks have ended and how many items they had."""
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
        self, news: Screenful, packed: list[GraphSample], names: dict[int, str], usual: bool = True
    ) -> Screenful:
        shape = self.shape if usual else shape_holding(packed)
        batch = collate(packed, shape, self.lookup.potential.model.dtype)
        del batch.names
        if self.lookup.rows_per_atom is not None:
            batch.pbc = torch.zeros(shape.structures, 3, dtype=torch.bool)
            batch.pbc[: len(packed)] = torch.from_numpy(np.stack([sample.structure.pbc for sample in packed]))
        news.batch, news.rows, news.usual = to_buffer(batch), self.lookup.rows(packed, names), usual
        return news


def _refused(item: Item, error: StructureError) -> Refused:
    structure = error.structure if isinstance(error, TooStrange) else None
    return Refused(
        index=item.index,
        source_id=item.source_id,
        formula="" if structure is None else str(Symbols(structure.numbers).get_chemical_formula()),
        atoms=0 if structure is None else len(structure),
        kind=error.reason,
        reason=str(error),
    )


def shape_for_screen(sources: Sequence[Source], lookup: Lookup, atoms: int) -> BatchShape:
    """Work out the shape of batches of some `atoms` atoms from the first structures of sources all over."""
    samples = []
    for source in sources[:: math.ceil(len(sources) / SOURCES) or 1]:
        good = 0
        for item in islice(source.items(0, lambda chunk: True), CHUNK):
            try:
                samples.append(lookup.sample(item))
            except StructureError:
                continue
            good += 1
            if good == LOOKED_AT:
                break
    if not samples:
        return BatchShape(structures=atoms, atoms=atoms, slots=2 * ROW_SLOTS * atoms)
    sizes = np.array([len(sample.structure) for sample in samples])
    rows = np.array([sample.rows for sample in samples])
    atoms = max(atoms, math.ceil(np.median(sizes)))  # far larger ones go alone, which memory may have room for
    return BatchShape(
        structures=math.ceil(1.25 * atoms / sizes.mean()),
        atoms=atoms,
        slots=max(math.ceil(atoms * rows.sum() / sizes.sum()), 1) * ROW_SLOTS,
    )


def screenfuls(lane: Lane, workers: int) -> Iterator[Screenful]:
    """Give what the workers of a rank hand over."""
    loader: DataLoader[Any] = DataLoader(
        lane,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_end_with_the_rank,
        pin_memory=has_gpu(),
    )
    yield from loader


def _end_with_the_rank(worker: int) -> None:
    """Let a worker ignore Ctrl-C, which every process receives, and end when the process of its rank ends.

    Otherwise a worker whose rank was killed would wait for ever to pass a batch on, and hold the rank's lock.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_creator()
