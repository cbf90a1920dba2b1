"""Passing of batches from worker processes to the training process, each as one buffer.

Passing one tensor between processes costs a shared file, a message and a memory map, about 0.5 ms. A batch has 25
tensors; passing them one by one took twice as long as making the batch. Small batches are passed by value, through the
pipe between the processes: for the shared file a thread of the worker has to answer, which takes milliseconds while the
worker makes the next batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydrazero.shards.graphs.graph import GraphBatch

ALIGNMENT = 64
"""Tensors begin at multiples of this number of bytes, as those of PyTorch do."""
BY_VALUE = 500_000
"""Bytes up to which a batch is passed by value."""


@dataclass(frozen=True, kw_only=True)
class BatchBuffer:
    """A batch as one array of bytes."""

    buffer: Tensor | np.ndarray
    """All tensors of the batch one after another, uint8 [bytes]; an array if it is passed by value."""
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    """Name, type, shape and first byte of each tensor."""
    others: dict[str, Any]
    """Other attributes of the batch: source ids, and its position in the stream."""

    def pin_memory(self) -> BatchBuffer:
        """Return a copy in pinned memory, from which a GPU reads faster; the DataLoader calls this."""
        return BatchBuffer(buffer=torch.as_tensor(self.buffer).pin_memory(), layout=self.layout, others=self.others)


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


def shared_bytes(batch: GraphBatch) -> int:
    """Return the shared memory that a batch takes on its way, bytes; 0 if it is passed by value."""
    size = to_buffer(batch).buffer.nbytes
    return 0 if size <= BY_VALUE else size


def by_value(handed: BatchBuffer) -> BatchBuffer:
    """Return a batch that is pickled with its content."""
    return BatchBuffer(buffer=np.asarray(handed.buffer), layout=handed.layout, others=handed.others)


def from_buffer(handed: BatchBuffer) -> GraphBatch:
    """Return the batch of a buffer; its tensors are views into the buffer, or into a copy if it was passed by value."""
    batch, buffer = GraphBatch(), handed.buffer
    if isinstance(buffer, np.ndarray):
        buffer = torch.from_numpy(buffer).clone()  # at an address as PyTorch aligns it, wherever it was unpickled
    for name, dtype, shape, begin in handed.layout:
        count = torch.Size(shape).numel() * dtype.itemsize
        batch[name] = buffer[begin : begin + count].view(dtype).view(shape)
    for name, value in handed.others.items():
        batch[name] = value
    return batch
