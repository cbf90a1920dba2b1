"""The stream: from shards to batches of a fixed size, deterministic, with its place as part of every batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hydrazero.shards.block_reader import BlockReader
from hydrazero.shards.errors import ConfigError, HydrazeroError, ShardError
from hydrazero.shards.graph import BatchShape, GraphBatch, GraphSample, collate, graph_sample
from hydrazero.shards.packing import Packer, pack
from hydrazero.shards.plan import LanePlace, LanePlan, TaskPlan, mixture_repeats


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What to stream and in which form."""

    folders: tuple[str, ...]
    """Shard folder of each task, in the order of the task ids."""
    cutoff: float
    """Å."""
    shape: BatchShape
    dtype: torch.dtype = torch.float32
    """Of positions, shifts, forces and stress."""
    seed: int = 0
    temperature: float = 1.0
    """Of the mixture, see `mixture_repeats`."""
    workers: int = 1
    """Worker processes per rank; 0 reads in the training process."""


class SplitReader:
    """The blocks of one split of all tasks, and structures out of them."""

    def __init__(self, settings: StreamSettings, split: str) -> None:
        self.settings = settings
        self.readers = [BlockReader(folder, split) for folder in settings.folders]

    def plans(self, temperature: float = 1.0) -> list[TaskPlan]:
        """Plans of the tasks; raises ShardError if all are empty."""
        sizes = [reader.block_sizes for reader in self.readers]
        counts = [int(size.sum()) for size in sizes]
        present = [count for count in counts if count]
        if not present:
            raise ShardError(f"no task has a structure in the split '{self.readers[0].split}'.")
        repeats = iter(mixture_repeats(present, temperature))
        return [
            TaskPlan(name=reader.manifest.task, block_sizes=size, repeats=next(repeats) if count else 0.0)
            for reader, size, count in zip(self.readers, sizes, counts, strict=True)
        ]

    def sample(self, task: int, block: int, row: int) -> GraphSample:
        """Read one structure and build its neighbours."""
        structure = self.readers[task].cached(block).structure(row)
        return graph_sample(structure, task, self.settings.cutoff, origin=(task, block, row))


class _LaneStream(IterableDataset):  # type: ignore[type-arg]
    """Endless batches of the lanes of one rank; each worker of a DataLoader takes one lane."""

    def __init__(
        self, settings: StreamSettings, rank: int, ranks: int, states: list[dict[str, Any]], turn: int
    ) -> None:
        self.settings, self.rank, self.ranks, self.states, self.turn = settings, rank, ranks, states, turn

    def __iter__(self) -> Iterator[GraphBatch | HydrazeroError]:
        # An error for the user is handed over as it is: raised here, it would arrive wrapped in a traceback's text.
        try:
            yield from self._batches()
        except HydrazeroError as error:
            yield error

    def _batches(self) -> Iterator[GraphBatch]:
        info = torch.utils.data.get_worker_info()
        lanes_here = max(self.settings.workers, 1)
        # The DataLoader asks its workers in turn from worker 0 on; after a resume that is the lane whose turn it is.
        lane = ((info.id if info else 0) + self.turn) % lanes_here
        reader = SplitReader(self.settings, "train")
        plan = LanePlan(
            reader.plans(self.settings.temperature),
            lane=self.rank * lanes_here + lane,
            lanes=self.ranks * lanes_here,
            seed=self.settings.seed,
        )
        yield from lane_batches(reader, plan, lane, self.states[lane])


def lane_batches(reader: SplitReader, plan: LanePlan, lane: int, state: dict[str, Any]) -> Iterator[GraphBatch]:
    """Yield a lane's batches without end; `batch.place` tells where the lane is after it, for a checkpoint."""
    settings = reader.settings
    place = LanePlace(epoch=state.get("epoch", 0), delivered=list(state.get("delivered", [])))
    packer = Packer(settings.shape)
    for task, block, row in state.get("pending", []):
        packer.add(reader.sample(task, block, row))
    walk = plan.walk(place)
    while True:
        while (packed := packer.pop_full()) is None:
            packer.add(reader.sample(*next(walk)))
        slots, samples = packed
        batch = collate(samples, settings.shape, slots, settings.dtype)
        batch.place = {
            "lane": lane,
            "epoch": place.epoch,
            "delivered": list(place.delivered),
            "pending": [list(sample.origin) for sample in packer.pending],
        }
        yield batch


class TrainStream:
    """A rank's endless training batches, with a place that can be saved and gone back to."""

    def __init__(self, settings: StreamSettings, rank: int, ranks: int, state: dict[str, Any] | None = None) -> None:
        self.settings, self.rank, self.ranks = settings, rank, ranks
        lanes_here = max(settings.workers, 1)
        state = state or {"ranks": ranks, "turn": 0, "lanes": [{} for _ in range(lanes_here)]}
        if state["ranks"] != ranks or len(state["lanes"]) != lanes_here:
            raise ConfigError(
                f"the checkpoint was written by {state['ranks']} ranks with {len(state['lanes'])} data lanes each and "
                f"cannot go on with {ranks} ranks and {lanes_here} lanes; start with the same numbers."
            )
        self._lanes: list[dict[str, Any]] = [dict(lane) for lane in state["lanes"]]
        self._turn = int(state["turn"])
        dataset = _LaneStream(settings, rank, ranks, [dict(lane) for lane in self._lanes], self._turn)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=settings.workers,
            prefetch_factor=4 if settings.workers else None,
            multiprocessing_context="fork" if settings.workers else None,
        )

    def __iter__(self) -> Iterator[GraphBatch]:
        for batch in self._loader:
            if isinstance(batch, HydrazeroError):
                batch.on_every_rank = False
                raise batch
            place = batch.place
            self._lanes[place["lane"]] = {key: place[key] for key in ("epoch", "delivered", "pending")}
            self._turn = (place["lane"] + 1) % len(self._lanes)
            yield batch

    @property
    def epoch(self) -> int:
        """Epoch of the lane that is furthest behind."""
        return min(int(lane.get("epoch", 0)) for lane in self._lanes)

    def state(self) -> dict[str, Any]:
        """Return the place after the last batch that was handed out, as plain types."""
        return {"ranks": self.ranks, "turn": self._turn, "lanes": [dict(lane) for lane in self._lanes]}


def split_samples(
    reader: SplitReader, task_ids: Sequence[int] | None = None, rank: int = 0, ranks: int = 1
) -> Iterator[GraphSample]:
    """Yield a rank's share of one pass over a split, each structure once.

    `task_ids` are the model's ids of the reader's tasks, where they are not simply 0, 1, 2, ...
    """
    number = 0
    for task, blocks in enumerate(reader.readers):
        for block, size in enumerate(blocks.block_sizes):
            for row in range(int(size)):
                if number % ranks == rank:
                    sample = reader.sample(task, block, row)
                    yield sample if task_ids is None else replace(sample, task=task_ids[task])
                number += 1


def evaluation_batches(settings: StreamSettings, split: str, rank: int, ranks: int) -> Iterator[GraphBatch]:
    """Yield batches of a rank's share of one pass over a split, in this process."""
    samples = split_samples(SplitReader(settings, split), rank=rank, ranks=ranks)
    for slots, packed in pack(samples, settings.shape):
        yield collate(packed, settings.shape, slots, settings.dtype)


def empty_batch(settings: StreamSettings) -> GraphBatch:
    """Return a batch of padding only, for a rank that has nothing left while others have."""
    return collate([], settings.shape, 8, settings.dtype)
