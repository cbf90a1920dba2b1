"""Batches from worker processes to the training process: one buffer in shared memory each.

A tensor that crosses between processes costs a shared file, a message and a map, about 0.5 ms; a batch has 25 of them,
which took twice as long as making it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.graphs.graph import GraphBatch

ALIGNMENT = 64
"""Bytes; tensors begin at its multiples, as torch's own do."""


@dataclass(frozen=True, kw_only=True)
class HandedBatch:
    """A batch as bytes."""

    buffer: Tensor
    """uint8, all tensors of the batch one after another."""
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    """Name, type, shape and first byte of each."""
    others: dict[str, Any]
    """What else the batch has: names, its place in the stream."""

    def pin_memory(self) -> HandedBatch:
        """Copy the buffer to where a GPU reads it fast; the DataLoader asks for it."""
        return HandedBatch(buffer=self.buffer.pin_memory(), layout=self.layout, others=self.others)


def to_buffer(batch: GraphBatch) -> HandedBatch:
    """Put a batch into one buffer."""
    content = batch.to_dict()
    tensors = {name: value.contiguous() for name, value in content.items() if isinstance(value, Tensor)}
    layout, end = [], 0
    for name, tensor in tensors.items():
        layout.append((name, tensor.dtype, tuple(tensor.shape), end))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8)
    for name, _, _, begin in layout:
        flat = tensors[name].reshape(-1).view(torch.uint8)
        buffer[begin : begin + flat.numel()] = flat
    others = {name: value for name, value in content.items() if name not in tensors}
    return HandedBatch(buffer=buffer, layout=tuple(layout), others=others)


def from_buffer(handed: HandedBatch) -> GraphBatch:
    """Return the batch; its tensors are views into the buffer."""
    batch = GraphBatch()
    for name, dtype, shape, begin in handed.layout:
        count = torch.Size(shape).numel() * dtype.itemsize
        batch[name] = handed.buffer[begin : begin + count].view(dtype).view(shape)
    for name, value in handed.others.items():
        batch[name] = value
    return batch
