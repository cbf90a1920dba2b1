"""The stream: a deterministic series of batches of a fixed size from shards; every batch knows its position in it."""

from __future__ import annotations

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hydrazero.shards.device import has_gpu
from hydrazero.shards.errors import HydrazeroError, ShardError
from hydrazero.shards.graphs.graph import BatchShape, GraphBatch, GraphSample, collate, graph_sample
from hydrazero.shards.location import Location
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.processes import end_with_creator
from hydrazero.shards.stream.batch_buffer import BatchBuffer, from_buffer, shared_bytes, to_buffer
from hydrazero.shards.stream.block_reader import BlockCache, BlockReader
from hydrazero.shards.stream.deal import Deal, LanePlace, TaskPlan, lane_number, mixture_repeats
from hydrazero.shards.stream.packing import Packer, pack
from hydrazero.shards.stream.shared_memory import POLL, check_shared_memory, outputs_of, ready_to_pass
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
"""Number of batches that each worker process prepares in advance."""
WITHOUT_WORKERS = "data.workers = 0"
"""Setting with which no process but that of the rank reads."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Settings of a stream."""

    folders: tuple[Location, ...]
    """Location of the shards of each task, in the order of task ids: a folder, a web address, or a command."""
    cutoff: float
    """Distance in Å within which atoms are neighbours."""
    shape: BatchShape
    dtype: torch.dtype = torch.float32
    """Data type of positions, shifts, forces and stress."""
    seed: int = 0
    temperature: float = 1.0
    """Temperature of the mixture; see `mixture_repeats`."""
    shares: tuple[float | None, ...] = ()
    """Fixed share of each task in the batches, or None; empty if no task has one."""
    targets: tuple[TargetColumn, ...] = ()
    """Quantities in the batches besides energy, forces and stress."""
    workers: int = 1
    """Number of worker processes per rank; with 0, the training process reads."""
    manifests: tuple[Manifest, ...] = ()
    """Manifests of the folders if they have been read already, so that thousands of ranks need not read them again."""
    on_bad_shard: str = "stop"
    """With 'stop', a block that cannot be read is an error; with 'skip', its structures are skipped and counted."""

    @property
    def lanes_per_rank(self) -> int:
        """Number of lanes of each rank: one per worker, or one for the training process."""
        return max(self.workers, 1)


class SplitReader:
    """Reads structures from the blocks of one split of all tasks."""

    def __init__(self, settings: StreamSettings, split: str) -> None:
        self.settings = settings
        manifests = settings.manifests or [None] * len(settings.folders)
        self.readers = [
            BlockReader(folder, split, manifest) for folder, manifest in zip(settings.folders, manifests, strict=True)
        ]
        self._cache = BlockCache(self.readers)
        self.skipped: Counter[str] = Counter()
        """Number of skipped structures by the fault of their block."""

    def plans(self) -> list[TaskPlan]:
        """Return the facts on all tasks for the deal; raise ShardError if one is empty."""
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
        """Return a digest of what positions in the stream depend on: tasks, their blocks, the seed and the mixture."""
        digest = hashlib.blake2b(digest_size=16)
        for reader in self.readers:
            digest.update(reader.manifest.task.encode() + b"\0" + reader.block_sizes.tobytes() + b"\0")
        mixture = (self.settings.seed, self.settings.temperature, *self.settings.shares)
        digest.update(repr(mixture).encode())
        return digest.hexdigest()

    def sample(self, task: int, block: int, row: int) -> GraphSample:
        """Return one structure with its neighbours; raise ShardError if its block cannot be read."""
        structure = self._cache.block(task, block).structure(row)
        return graph_sample(structure, task, self.settings.cutoff, origin=(task, block, row))

    def samples(self, places: Iterator[tuple[int, int, int]]) -> Iterator[GraphSample]:
        """Yield the structures at places (task, block, row); the settings say whether damaged blocks are skipped."""
        for place in places:
            try:
                yield self.sample(*place)
            except ShardError as error:
                if self.settings.on_bad_shard != "skip":
                    raise
                self.skipped[str(error)] += 1


class _LaneStream(IterableDataset):  # type: ignore[type-arg]
    """Endless batches of the lanes of one rank, of which each worker of a DataLoader takes one."""

    def __init__(self, settings: StreamSettings, rank: int, ranks: int, start: StreamStart) -> None:
        self.settings, self.rank, self.ranks, self.start = settings, rank, ranks, start

    def __iter__(self) -> Iterator[BatchBuffer | HydrazeroError]:
        # An error for the user is passed as an item: raised here, it would arrive as the text of a traceback.
        try:
            yield from self._batches()
        except HydrazeroError as error:
            yield error

    def _batches(self) -> Iterator[BatchBuffer]:
        info = torch.utils.data.get_worker_info()
        # The DataLoader starts with worker 0, which therefore takes the lane whose turn it is after a resume.
        worker = ((info.id if info else 0) + self.start.turns[self.rank]) % self.settings.lanes_per_rank
        lane = lane_number(self.rank, worker, self.ranks)
        reader = SplitReader(self.settings, "train")
        for batch in lane_batches(reader, self.start.deal, lane, self.start.lanes[lane]):
            batch.place["worker"] = worker
            yield ready_to_pass(to_buffer(batch), WITHOUT_WORKERS)


def _outlive_requests_to_stop(worker: int) -> None:
    """Ignore the signals that schedulers send to every process: the rank stops its workers, after a checkpoint.

    A worker whose rank ends without stopping it ends too. It would otherwise wait for ever to pass its last batches on,
    and keep open what it has inherited: the output of the command, and the connections by which others notice the end.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_when_the_rank_says_so, daemon=True).start()
    end_with_creator()


def _end_when_the_rank_says_so() -> None:
    """End this process at a SIGTERM of its parent, which Python sends when the parent ends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def lane_batches(reader: SplitReader, deal: Deal, lane: int, state: LaneState) -> Iterator[GraphBatch]:
    """Yield the batches of a lane without end; `batch.place` is the state of the lane after the batch."""
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
    """Endless training batches of a rank, whose position can be saved and resumed."""

    def __init__(self, settings: StreamSettings, rank: int, ranks: int, saved: dict[str, Any] | None = None) -> None:
        """Start a stream, or resume it from `saved`, a result of `saved_state`.

        With the same number of ranks and workers, the stream continues with exactly the next batch; with another
        number, the rest of the epoch is dealt again. Raises ConfigError if tasks, seed or temperature differ from those
        of the saved state or shared memory is too small for the batches of the workers, ShardError if a manifest cannot
        be read.
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
        self.stop: Callable[[], str] = lambda: ""
        """Function that returns why the process is to stop, "" if it is not; asked for while no batch comes."""
        self._needed = 0
        if settings.workers:
            self._needed = settings.workers * (PREFETCHED_BATCHES + 1) * shared_bytes(empty_batch(settings))
            check_shared_memory(self._needed, WITHOUT_WORKERS)
        dataset = _LaneStream(settings, rank, ranks, self._start)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=settings.workers,
            prefetch_factor=PREFETCHED_BATCHES if settings.workers else None,
            multiprocessing_context="fork" if settings.workers else None,
            worker_init_fn=_outlive_requests_to_stop,
            timeout=POLL if settings.workers else 0,
            pin_memory=has_gpu(),
        )

    def __iter__(self) -> Iterator[GraphBatch]:
        for handed in outputs_of(self._loader, self._needed, WITHOUT_WORKERS, lambda: self.stop()):
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
        """Epoch of the slowest lane."""
        return min(lane.epoch for lane in self._lanes)

    @property
    def skipped(self) -> Counter[str]:
        """Number of structures that this rank has skipped, by the fault of their blocks."""
        total: Counter[str] = Counter()
        for counts in self._skipped.values():
            total.update(counts)
        return total

    def state(self) -> bytes:
        """Return the state of this rank after the last batch that was yielded."""
        return rank_state(self._lanes, self._turn)

    def saved_state(self, of_ranks: Sequence[bytes]) -> dict[str, Any]:
        """Return the state of the stream for a checkpoint, from the `state` of every rank."""
        return saved_state(self._fingerprint, self._start.past, of_ranks)


def split_places(reader: SplitReader, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, int, int]]:
    """Yield places (task, block, row) of a rank's part of one pass over a split; each structure appears once."""
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
    """Yield a rank's part of one pass over a split; each structure appears once.

    `task_ids` are the ids in the model of the reader's tasks, if they are not 0, 1, 2, ...
    """
    for sample in reader.samples(split_places(reader, rank, ranks)):
        yield sample if task_ids is None else replace(sample, task=task_ids[sample.task])


def evaluation_batches(reader: SplitReader, rank: int, ranks: int) -> Iterator[GraphBatch]:
    """Yield the batches of a rank's part of one pass over a split, read in this process."""
    settings = reader.settings
    for packed in pack(split_samples(reader, rank=rank, ranks=ranks), settings.shape):
        yield collate(packed, settings.shape, settings.dtype, settings.targets)


def empty_batch(settings: StreamSettings) -> GraphBatch:
    """Return a batch of padding only, for a rank without structures while others still have some."""
    return collate([], settings.shape, settings.dtype, settings.targets)
