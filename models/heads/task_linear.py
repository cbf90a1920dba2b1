"""Linear layers with weights of their own for every task: one parameter with a leading task dimension.

A module per task would give ranks that see different tasks different work, which ZeRO takes for granted not to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from hydrazero.models.ops.exact import exact_linear, exact_matmul

LOWEST, HIGHEST = 4, 8
"""Binary logarithms of the heights of blocks of rows."""


@dataclass(frozen=True, kw_only=True)
class TaskBlocks:
    """Where rows of T tasks go in blocks of one task each, of which there are as many whatever the rows' tasks."""

    place: Tensor
    """Row in the blocks of each of the N rows, [N] int64."""
    task: Tensor
    """Of each of the N // height + T blocks, [B] int64."""
    height: int
    """Rows of a block."""
    count: int
    """T."""

    def gather(self, rows: Tensor) -> Tensor:
        """Put rows [N, I] into blocks [B, height, I], the rest of which is 0."""
        flat = rows.new_zeros(len(self.task) * self.height, rows.shape[1])
        return flat.index_copy(0, self.place, rows).view(len(self.task), self.height, -1)

    def matrices(self, weight: Tensor) -> Tensor:
        """Return each block's task's matrix: [T, O, I] -> [B, O, I]."""
        if weight.is_contiguous():
            return weight[self.task]
        return weight.transpose(1, 2)[self.task].transpose(1, 2)  # copied as it lies in memory, several times as fast

    def sum(self, products: Tensor) -> Tensor:
        """Sum what blocks hold over those of each task: [B, O, I] -> [T, O, I]."""
        member = functional.one_hot(self.task, self.count).to(products.dtype)
        return exact_matmul(member.t(), products.flatten(1)).view(-1, *products.shape[1:])

    def scatter(self, blocks: Tensor) -> Tensor:
        """Take rows [N, I] from blocks [B, height, I]."""
        return blocks.flatten(0, 1)[self.place]


def task_blocks(task: Tensor, count: int) -> TaskBlocks:
    """Sort rows [N] of `count` tasks into blocks, about as high as a task has rows on average.

    Higher ones would hold more padding, lower ones would read the tasks' matrices more often.
    """
    height = 2 ** min(max((len(task) // count).bit_length() - 1, LOWEST), HIGHEST)
    member = functional.one_hot(task, count)
    before = (member.cumsum(0) * member).sum(1) - 1  # of a row's own task
    last = ((member.sum(0) + height - 1) // height).cumsum(0)
    first = torch.cat([last.new_zeros(1), last[:-1]])
    blocks = torch.arange(len(task) // height + count, device=task.device)
    return TaskBlocks(
        place=first[task] * height + before,
        task=torch.searchsorted(last, blocks, right=True).clamp(max=count - 1),
        height=height,
        count=count,
    )


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """Which of T tasks each of N rows belongs to."""

    task: Tensor
    """[N] int64."""
    count: int
    """T."""
    kernels: bool = False
    """Whether products are those of `hydrazero.models.ops.kernels`, which must be loaded, or plain PyTorch's."""

    @cached_property
    def blocks(self) -> TaskBlocks:
        """How plain PyTorch multiplies rows of several tasks."""
        return task_blocks(self.task, self.count)

    def pick(self, table: Tensor) -> Tensor:
        """Return each row's task's entry of a table: [T, ...] -> [N, ...], differentiable without a scatter."""
        flat = table.reshape(self.count, -1)
        member = functional.one_hot(self.task, self.count).to(table.dtype)
        return exact_matmul(member, flat).view(-1, *table.shape[1:])

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply each row with its task's matrix: x [N, I], weight [T, O, I] -> [N, O]."""
        if self.count == 1 and not self.kernels:
            return exact_linear(x, weight[0])
        return _TaskLinear.apply(x, weight.to(x.dtype), self)


class _TaskLinear(Function):
    """(x, W) -> W[task] x; like its derivatives bilinear, so closed under differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: TaskRows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight)
        if not rows.kernels:
            matrices = rows.blocks.matrices(weight).transpose(1, 2)
            return rows.blocks.scatter(exact_matmul(rows.blocks.gather(x), matrices))
        out: Tensor = torch.ops.hydrazero.task_linear(x, weight, rows.task)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x = _TaskLinear.apply(grads[0], weight.transpose(1, 2), ctx.rows)
        return for_x, _TaskOuter.apply(grads[0], x, ctx.rows), None


class _TaskOuter(Function):
    """(g, x) -> sum of g x^T over the rows of each task."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, rows: TaskRows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(g, x)
        if rows.count == 1 and not rows.kernels:
            return exact_matmul(g.t(), x).unsqueeze(0)
        if not rows.kernels:
            return rows.blocks.sum(exact_matmul(rows.blocks.gather(g).transpose(1, 2), rows.blocks.gather(x)))
        out: Tensor = torch.ops.hydrazero.task_outer(g, x, rows.task, rows.count)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        weight = grads[0]
        for_g = _TaskLinear.apply(x, weight, ctx.rows)
        return for_g, _TaskLinear.apply(g, weight.transpose(1, 2), ctx.rows), None


def probed(x: Tensor, probe: Tensor, rows: TaskRows) -> Tensor:
    """Return x [N, F] as a linear layer that is the identity for each of the tasks would leave it.

    The gradient of `probe` [T, F, F] is that of the layer's weights, task by task: what each task wants of a layer that
    all share, from one backward pass. The values of `probe` are not used. Once its gradient is taken it cannot be
    differentiated again.
    """
    return _Identity.apply(x, probe, rows)


class _Identity(Function):
    """(x, I) -> x; in its derivatives the identity stays, so that second derivatives find the layer again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: TaskRows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x = _Identity.apply(grads[0], weight.transpose(1, 2), ctx.rows)
        return for_x, _TaskOuter.apply(grads[0], x, ctx.rows), None


class TaskLinear(nn.Module):
    """y = W[task] x + b[task]."""

    def __init__(self, tasks: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(tasks, outputs, inputs))
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias = nn.Parameter(torch.zeros(tasks, outputs)) if bias else None

    def forward(self, x: Tensor, rows: TaskRows) -> Tensor:
        """Rows [N, I] -> [N, O], each by its own task."""
        out = rows.matmul(x, self.weight)
        return out if self.bias is None else out + rows.pick(self.bias)

    def each_task(self, x: Tensor) -> Tensor:
        """What every task has of each row [N, T, I] -> [N, T, O], by that task."""
        out = exact_matmul(x.transpose(0, 1), self.weight.transpose(1, 2)).transpose(0, 1)
        return out if self.bias is None else out + self.bias

    def all_tasks(self, x: Tensor) -> Tensor:
        """Rows [N, I] -> [N, T, O], by every task."""
        tasks, outputs, inputs = self.weight.shape
        bias = None if self.bias is None else self.bias.reshape(-1)
        return exact_linear(x, self.weight.reshape(-1, inputs), bias).view(-1, tasks, outputs)
