"""Passing of batches from worker processes to the training process, each as one buffer in shared memory.

Passing one tensor between processes costs a shared file, a message and a memory map, about 0.5 ms. A batch has 25
tensors; passing them one by one took twice as long as making the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydrazero.shards.graphs.graph import GraphBatch

ALIGNMENT = 64
"""Tensors begin at multiples of this number of bytes, as those of PyTorch do."""


@dataclass(frozen=True, kw_only=True)
class BatchBuffer:
    """A batch as one array of bytes."""

    buffer: Tensor
    """All tensors of the batch one after another, uint8 [bytes]."""
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    """Name, type, shape and first byte of each tensor."""
    others: dict[str, Any]
    """Other attributes of the batch: source ids, and its position in the stream."""

    def pin_memory(self) -> BatchBuffer:
        """Return a copy in pinned memory, from which a GPU reads faster; the DataLoader calls this."""
        return BatchBuffer(buffer=self.buffer.pin_memory(), layout=self.layout, others=self.others)


def to_buffer(batch: GraphBatch) -> BatchBuffer:
    """Return a batch as one buffer."""
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
    return BatchBuffer(buffer=buffer, layout=tuple(layout), others=others)


def from_buffer(handed: BatchBuffer) -> GraphBatch:
    """Return the batch of a buffer; its tensors are views into the buffer."""
    batch = GraphBatch()
    for name, dtype, shape, begin in handed.layout:
        count = torch.Size(shape).numel() * dtype.itemsize
        batch[name] = handed.buffer[begin : begin + count].view(dtype).view(shape)
    for name, value in handed.others.items():
        batch[name] = value
    return batch
