"""The stream: from shards to batches of a fixed size, deterministic, with its place as part of every batch."""

from __future__ import annotations

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hydrazero.shards.device import has_gpu
from hydrazero.shards.errors import HydrazeroError, ShardError
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, GraphSample, collate, graph_sample
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.stream.batch_buffer import BatchBuffer, from_buffer, to_buffer
from hydrazero.shards.stream.block_reader import BlockCache, BlockReader
from hydrazero.shards.stream.deal import Deal, LanePlace, TaskPlan, lane_number, mixture_repeats
from hydrazero.shards.stream.packing import Packer, pack
from hydrazero.shards.stream.state import (
    LaneState,
    StreamStart,
    check_fingerprint,
    rank_state,
    saved_state,
    start_of_stream,
)
from hydrazero.shards.targets import TargetColumn

PREFETCHED_BATCHES = 4
"""Batches that each worker process may be ahead."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What to stream and in which form."""

    folders: tuple[str, ...]
    """Where each task's shards lie, in the order of the task ids: folders, web addresses, or pipes with '{}'."""
    cutoff: float
    """Å."""
    shape: BatchShape
    dtype: torch.dtype = torch.float32
    """Of positions, shifts, forces and stress."""
    seed: int = 0
    temperature: float = 1.0
    """Of the mixture, see `mixture_repeats`."""
    shares: tuple[float | None, ...] = ()
    """Fixed shares of tasks, None for those without; empty if no task has one."""
    targets: tuple[TargetColumn, ...] = ()
    """Quantities beside energy, forces and stress that batches shall hold."""
    workers: int = 1
    """Worker processes per rank; 0 reads in the training process."""
    manifests: tuple[Manifest, ...] = ()
    """Of the folders, where somebody has read them already; thousands of ranks do not each read them again."""
    on_bad_shard: str = "stop"
    """'stop' raises where a block cannot be read; 'skip' leaves its structures out and counts them."""

    @property
    def lanes_per_rank(self) -> int:
        """Lanes of each rank: its workers, or the training process itself."""
        return max(self.workers, 1)


class SplitReader:
    """The blocks of one split of all tasks, and structures out of them."""

    def __init__(self, settings: StreamSettings, split: str) -> None:
        self.settings = settings
        manifests = settings.manifests or [None] * len(settings.folders)
        self.readers = [
            BlockReader(folder, split, manifest) for folder, manifest in zip(settings.folders, manifests, strict=True)
        ]
        self._cache = BlockCache(self.readers)
        self.skipped: Counter[str] = Counter()
        """Structures left out, by what was wrong with their block."""

    def plans(self) -> list[TaskPlan]:
        """Plans of the tasks; raises ShardError if one is empty."""
        sizes = [reader.block_sizes for reader in self.readers]
        for reader, size in zip(self.readers, sizes, strict=True):
            if not len(size):
                raise ShardError(f"{reader.folder} has no structures in the split '{reader.split}'.")
        counts = [int(size.sum()) for size in sizes]
        repeats = mixture_repeats(counts, self.settings.temperature, self.settings.shares)
        return [
            TaskPlan(name=reader.manifest.task, block_sizes=size, repeats=repeat)
            for reader, size, repeat in zip(self.readers, sizes, repeats, strict=True)
        ]

    def fingerprint(self) -> str:
        """Return what a place in the stream depends on, as a digest: the tasks, their blocks, seed and mixture."""
        digest = hashlib.blake2b(digest_size=16)
        for reader in self.readers:
            digest.update(reader.manifest.task.encode() + b"\0" + reader.block_sizes.tobytes() + b"\0")
        mixture = (self.settings.seed, self.settings.temperature, *self.settings.shares)
        digest.update(repr(mixture).encode())
        return digest.hexdigest()

    def sample(self, task: int, block: int, row: int) -> GraphSample:
        """Read one structure and find its neighbours; raises ShardError where its block cannot be read."""
        structure = self._cache.block(task, block).structure(row)
        return graph_sample(structure, task, self.settings.cutoff, origin=(task, block, row))

    def samples(self, places: Iterator[tuple[int, int, int]]) -> Iterator[GraphSample]:
        """Read the structures at (task, block, row); those in damaged blocks are skipped if the settings say so."""
        for place in places:
            try:
                yield self.sample(*place)
            except ShardError as error:
                if self.settings.on_bad_shard != "skip":
                    raise
                self.skipped[str(error)] += 1


class _LaneStream(IterableDataset):  # type: ignore[type-arg]
    """Endless batches of the lanes of one rank; each worker of a DataLoader takes one lane."""

    def __init__(self, settings: StreamSettings, rank: int, ranks: int, start: StreamStart) -> None:
        self.settings, self.rank, self.ranks, self.start = settings, rank, ranks, start

    def __iter__(self) -> Iterator[BatchBuffer | HydrazeroError]:
        # An error for the user is handed over as it is: raised here, it would arrive wrapped in a traceback's text.
        try:
            yield from self._batches()
        except HydrazeroError as error:
            yield error

    def _batches(self) -> Iterator[BatchBuffer]:
        info = torch.utils.data.get_worker_info()
        # The DataLoader asks its workers in turn from worker 0 on; after a resume that is the lane whose turn it is.
        worker = ((info.id if info else 0) + self.start.turns[self.rank]) % self.settings.lanes_per_rank
        lane = lane_number(self.rank, worker, self.ranks)
        reader = SplitReader(self.settings, "train")
        for batch in lane_batches(reader, self.start.deal, lane, self.start.lanes[lane]):
            batch.place["worker"] = worker
            yield to_buffer(batch)


def _outlive_requests_to_stop(worker: int) -> None:
    """Let a worker ignore what schedulers send to every process: its rank stops it, after the step and a checkpoint."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_when_the_rank_says_so, daemon=True).start()


def _end_when_the_rank_says_so() -> None:
    """End this process at a SIGTERM of its parent, by which Python ends the workers of a process that is to end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def lane_batches(reader: SplitReader, deal: Deal, lane: int, state: LaneState) -> Iterator[GraphBatch]:
    """Yield a lane's batches without end; `batch.place` tells where the lane is after it, for a checkpoint."""
    settings = reader.settings
    place = LanePlace(epoch=state.epoch, delivered=list(state.delivered))
    packer = Packer(settings.shape)
    for sample in reader.samples(iter(state.pending)):
        packer.add(sample)
    walk = reader.samples(deal.walk(lane, place))
    while True:
        while (packed := packer.pop_full()) is None:
            packer.add(next(walk))
        batch = collate(packed, settings.shape, settings.dtype, settings.targets)
        pending = [(int(task), int(block), int(row)) for task, block, row in (s.origin for s in packer.pending)]
        after = LaneState(epoch=place.epoch, delivered=tuple(place.delivered), pending=tuple(pending))
        batch.place = {"state": after, "skipped": dict(reader.skipped)}
        yield batch


class TrainStream:
    """A rank's endless training batches, with a place that can be saved and gone back to."""

    def __init__(self, settings: StreamSettings, rank: int, ranks: int, saved: dict[str, Any] | None = None) -> None:
        """`saved` is what `saved_state` made of all ranks' `state`.

        On the same number of ranks and workers the stream goes on with the very next batch; on another, what is left
        of the epoch is dealt anew. Raises ConfigError if tasks, seed or temperature are not those of the saved state,
        ShardError if a manifest cannot be read.
        """
        self.settings, self.rank, self.ranks = settings, rank, ranks
        reader = SplitReader(settings, "train")
        self._fingerprint = reader.fingerprint()
        check_fingerprint(saved, self._fingerprint)
        self._start = start_of_stream(reader.plans(), settings.seed, ranks, settings.lanes_per_rank, saved)
        numbers = [lane_number(rank, worker, ranks) for worker in range(settings.lanes_per_rank)]
        self._lanes = [self._start.lanes[number] for number in numbers]
        self._turn = self._start.turns[rank]
        self._skipped: dict[int, dict[str, int]] = {}
        dataset = _LaneStream(settings, rank, ranks, self._start)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=settings.workers,
            prefetch_factor=PREFETCHED_BATCHES if settings.workers else None,
            multiprocessing_context="fork" if settings.workers else None,
            worker_init_fn=_outlive_requests_to_stop,
            pin_memory=has_gpu(),
        )

    def __iter__(self) -> Iterator[GraphBatch]:
        for handed in self._loader:
            if isinstance(handed, HydrazeroError):
                handed.on_every_rank = False
                raise handed
            batch = from_buffer(handed)
            worker = batch.place["worker"]
            self._lanes[worker] = batch.place["state"]
            self._skipped[worker] = batch.place["skipped"]
            self._turn = (worker + 1) % len(self._lanes)
            yield batch

    @property
    def epoch(self) -> int:
        """Epoch of the lane that is furthest behind."""
        return min(lane.epoch for lane in self._lanes)

    @property
    def skipped(self) -> Counter[str]:
        """Structures left out so far on this rank, by what was wrong with their blocks."""
        total: Counter[str] = Counter()
        for counts in self._skipped.values():
            total.update(counts)
        return total

    def state(self) -> bytes:
        """Return this rank's place after the last batch that was handed out."""
        return rank_state(self._lanes, self._turn)

    def saved_state(self, of_ranks: Sequence[bytes]) -> dict[str, Any]:
        """Return what a checkpoint keeps, from the `state` of every rank."""
        return saved_state(self._fingerprint, self._start.past, of_ranks)


def split_places(reader: SplitReader, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, int, int]]:
    """Yield a rank's share of one pass over a split, (task, block, row), each structure once."""
    number = 0
    for task, blocks in enumerate(reader.readers):
        for block, size in enumerate(blocks.block_sizes):
            for row in range(int(size)):
                if number % ranks == rank:
                    yield task, block, row
                number += 1


def split_samples(
    reader: SplitReader, task_ids: Sequence[int] | None = None, rank: int = 0, ranks: int = 1
) -> Iterator[GraphSample]:
    """Yield a rank's share of one pass over a split, each structure once.

    `task_ids` are the model's ids of the reader's tasks, where they are not simply 0, 1, 2, ...
    """
    for sample in reader.samples(split_places(reader, rank, ranks)):
        yield sample if task_ids is None else replace(sample, task=task_ids[sample.task])


def evaluation_batches(reader: SplitReader, rank: int, ranks: int) -> Iterator[GraphBatch]:
    """Yield batches of a rank's share of one pass over a reader's split, in this process."""
    settings = reader.settings
    for packed in pack(split_samples(reader, rank=rank, ranks=ranks), settings.shape):
        yield collate(packed, settings.shape, settings.dtype, settings.targets)


def empty_batch(settings: StreamSettings) -> GraphBatch:
    """Return a batch of padding only, for a rank that has nothing left while others have."""
    return collate([], settings.shape, settings.dtype, settings.targets)
