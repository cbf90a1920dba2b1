"""From sources to batches: worker processes read, find neighbours, pack and lay out, while the model computes."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from ase.geometry import complete_cell
from ase.symbols import Symbols
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hydrazero.models.potential import Potential
from hydrazero.models.screening.relaxed import Relaxer
from hydrazero.models.screening.settings import CHUNK, ScreenSettings
from hydrazero.models.screening.sources import Item, Items, Source, structure_at, walk
from hydrazero.models.task_facts import known_elements, reference_table
from hydrazero.shards.errors import StructureError
from hydrazero.shards.graph import BatchShape, GraphSample, collate, graph_sample, shape_holding
from hydrazero.shards.handover import HandedBatch, to_buffer
from hydrazero.shards.neighbours import ROW_SLOTS, HalfPairs
from hydrazero.shards.packing import Packer, fits
from hydrazero.shards.structure import Structure

LOOKED_AT = 64
"""Structures of each source that the shape of batches is worked out from."""
PREFETCHED = 4
"""Batches that each worker may be ahead."""
REMEMBERED = 100_000
"""Compositions whose formula, references and tasks a worker keeps."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A structure that is not computed."""

    index: int
    source_id: str
    formula: str
    atoms: int
    kind: str
    """Short stable word, by which they are counted."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What follows from the atomic numbers alone; T tasks of the screen."""

    formula: str
    known: NDArray[np.bool_]
    """Whether the task has seen all elements, [T]."""
    reference: NDArray[np.float64]
    """Sum of the task's reference energies, eV, [T]."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is known of the S structures of a batch before it is computed."""

    index: NDArray[np.int64]
    source_ids: list[str]
    formulas: list[str]
    atoms: NDArray[np.int32]
    usable: NDArray[np.bool_]
    """Whether a task can take a structure, [S, T]."""
    reference: NDArray[np.float64]
    """eV, [S, T]."""
    structures: list[Structure]
    """Where they have been relaxed; else none."""


@dataclass(kw_only=True)
class Screenful:
    """What a worker hands over: a batch or none, and news of its chunks."""

    batch: HandedBatch | None = None
    rows: Rows | None = None
    usual: bool = True
    """Whether the batch has the shape that most have."""
    refused: list[Refused] = field(default_factory=list)
    finished: dict[int, int] = field(default_factory=dict)
    """Chunk that has been read to its end -> its number of structures."""
    total: int | None = None
    """Number of structures in all sources, once it is known."""

    def pin_memory(self) -> Screenful:
        """Copy the batch to where a GPU reads it fast; the DataLoader asks for it."""
        self.batch = None if self.batch is None else self.batch.pin_memory()
        return self


class Lookup:
    """What the tasks say to structures."""

    def __init__(self, potential: Potential, settings: ScreenSettings) -> None:
        self.potential, self.settings = potential, settings
        self.rows_per_atom: float | None = None
        """Of neighbour slots, an estimate, where neighbours are found on the model's device and not by the workers."""
        facts = [potential.facts(task) for task in settings.tasks]
        self._references = reference_table(facts).numpy().T
        self._known = known_elements(facts).numpy().T
        self._needs_multiplicity = np.array([task.charge_spin and task.multiplicity_known for task in facts])
        self._compositions: dict[bytes, Composition] = {}

    def composition(self, structure: Structure) -> Composition:
        """What follows from a structure's atomic numbers."""
        key = structure.numbers.tobytes()
        if key not in self._compositions:
            if len(self._compositions) >= REMEMBERED:
                self._compositions.clear()
            numbers = structure.numbers.astype(np.int64)
            self._compositions[key] = Composition(
                formula=str(Symbols(numbers).get_chemical_formula()),
                known=np.asarray(self._known[numbers].all(axis=0)),
                reference=self._references[numbers].sum(axis=0),
            )
        return self._compositions[key]

    def usable(self, structure: Structure) -> NDArray[np.bool_]:
        """Whether each task can take a structure, [T]."""
        known = self.composition(structure).known
        return known if structure.multiplicity else known & ~self._needs_multiplicity

    def sample(self, item: Item) -> GraphSample:
        """Read an item and find its neighbours; raises StructureError for what cannot be computed."""
        structure = structure_at(item)
        if len(structure) > self.settings.max_atoms:
            most = self.settings.max_atoms
            raise TooStrange(structure, "too_large", f"has {len(structure)} atoms, more than --max-atoms {most}")
        if not self.usable(structure).any():
            reasons = (self.potential.why_not(structure, task) for task in self.settings.tasks)
            raise TooStrange(structure, "unseen", next(reason for reason in reasons if reason))
        if self.rows_per_atom is None:
            return graph_sample(structure, 0, self.potential.cutoff, origin=(item.index,))
        rows = math.ceil(self.rows_per_atom * len(structure))
        if structure.pbc.any() and not structure.pbc.all():  # the engine wants three independent vectors
            along = np.where(structure.pbc[:, None], structure.cell, 0.0)
            structure = replace(structure, cell=complete_cell(along))
        none = np.zeros(0, dtype=np.int64)
        pairs = HalfPairs(first=none, second=none, shift=None, degrees=np.zeros(len(structure), dtype=np.int64))
        return GraphSample(structure=structure, pairs=pairs, task=0, rows=rows, edges=0, origin=(item.index,))

    def rows(self, packed: Sequence[GraphSample], names: dict[int, str]) -> Rows:
        """What is known of the structures of a batch; `names` gives up those of its structures."""
        structures = [sample.structure for sample in packed]
        compositions = [self.composition(structure) for structure in structures]
        index = np.array([sample.origin[0] for sample in packed], dtype=np.int64)
        return Rows(
            index=index,
            source_ids=[names.pop(number) for number in index.tolist()],
            formulas=[composition.formula for composition in compositions],
            atoms=np.array([len(structure) for structure in structures], dtype=np.int32),
            usable=np.stack([self.usable(structure) for structure in structures]),
            reference=np.stack([composition.reference for composition in compositions]),
            structures=structures if self.settings.relax else [],
        )


class TooStrange(StructureError):
    """A sound structure that no task can take."""

    def __init__(self, structure: Structure, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.structure = structure


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
    """Work out the shape of batches of some `atoms` atoms from the first structures of each source."""
    samples = []
    for source in sources:
        good = 0
        for item in source.items(0, lambda chunk: chunk == 0):
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
    atoms = max(atoms, int(sizes.max()))
    return BatchShape(
        structures=math.ceil(1.25 * atoms / sizes.mean()),
        atoms=atoms,
        slots=max(math.ceil(atoms * rows.sum() / sizes.sum()), int(rows.max()), 1) * ROW_SLOTS,
    )


def screenfuls(lane: Lane, workers: int) -> Iterator[Screenful]:
    """Give what the workers of a rank hand over."""
    loader: DataLoader[Any] = DataLoader(
        lane,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_leave_interrupts_to_the_rank,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


def _leave_interrupts_to_the_rank(worker: int) -> None:
    """Let a worker ignore Ctrl-C, which goes to every process: it ends with its rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

