"""Packing of structures into batches of a fixed size, structures of like density together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hydrazero.shards.errors import StructureError
from hydrazero.shards.graph import SLOT_CLASSES, BatchShape, GraphSample

LOOK_AHEAD_BATCHES = 8
"""Batches' worth of structures that may wait for company before the oldest is sent off in a part-filled batch."""


def slots_needed(sample: GraphSample, shape: BatchShape) -> int:
    """Return the sample's slot class; raises StructureError, with the budget it needs, if no batch holds it."""
    n = len(sample.structure)
    if n > shape.atoms_with(sample.slot_class):
        raise StructureError(
            "too_large",
            f"{sample.structure.source_id} has {n} atoms with up to {sample.slot_class} neighbour slots each, more "
            f"than a batch holds; set batch.atoms to at least {n} and batch.slots to at least {n * sample.slot_class}.",
        )
    return sample.slot_class


class Packer:
    """Collects samples and gives out lists of them that fill a batch.

    A pure function of the order in which samples come, so the same stream gives the same batches; `pending` is what a
    checkpoint must hold besides the place in the stream.
    """

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        self._waiting: dict[int, list[GraphSample]] = {k: [] for k in SLOT_CLASSES}
        self._arrival: list[GraphSample] = []

    @property
    def pending(self) -> list[GraphSample]:
        """Samples that wait, in the order in which they came."""
        return list(self._arrival)

    def add(self, sample: GraphSample) -> None:
        """Let a sample wait; raises StructureError if it can never fit."""
        self._waiting[slots_needed(sample, self.shape)].append(sample)
        self._arrival.append(sample)

    def pop_full(self) -> tuple[int, list[GraphSample]] | None:
        """Return (slots per atom, samples) of a class that has enough for a batch, or None while none has.

        With too many waiting, the class of the oldest goes out part-filled, so that no structure waits for ever.
        """
        for slots, waiting in self._waiting.items():
            if waiting and self._fills(slots, waiting):
                return slots, self._take(slots)
        if len(self._arrival) > LOOK_AHEAD_BATCHES * self.shape.structures:
            slots = self._arrival[0].slot_class
            return slots, self._take(slots)
        return None

    def pop_any(self) -> tuple[int, list[GraphSample]] | None:
        """Return whatever waits longest, full or not, or None when nothing waits: for the end of a finite pass."""
        if not self._arrival:
            return None
        slots = self._arrival[0].slot_class
        return slots, self._take(slots)

    def _fills(self, slots: int, waiting: list[GraphSample]) -> bool:
        # Twice the batch must wait before it is packed: the look-ahead that lets small structures fill the gaps.
        atoms = sum(len(sample.structure) for sample in waiting)
        return len(waiting) >= 2 * self.shape.structures or atoms >= 2 * self.shape.atoms_with(slots)

    def _take(self, slots: int) -> list[GraphSample]:
        """Take the oldest of a class, and after it whatever still fits, first come first served."""
        taken: list[GraphSample] = []
        left: list[GraphSample] = []
        room = self.shape.atoms_with(slots)
        for sample in self._waiting[slots]:
            if len(taken) < self.shape.structures and len(sample.structure) <= room:
                taken.append(sample)
                room -= len(sample.structure)
            else:
                left.append(sample)
        self._waiting[slots] = left
        gone = {id(sample) for sample in taken}
        self._arrival = [sample for sample in self._arrival if id(sample) not in gone]
        return taken


def pack(samples: Iterable[GraphSample], shape: BatchShape) -> Iterator[tuple[int, list[GraphSample]]]:
    """Pack a finite series of samples: yields (slots per atom, samples), each sample once."""
    packer = Packer(shape)
    for sample in samples:
        packer.add(sample)
        while (packed := packer.pop_full()) is not None:
            yield packed
    while (packed := packer.pop_any()) is not None:
        yield packed
