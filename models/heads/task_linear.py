"""Linear layers with separate weights for every task, stored as one parameter with a leading task dimension.

ZeRO assumes that all ranks use the same parameters in the same order. With one module per task, ranks that see
different tasks would violate that assumption.
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
"""Binary logarithms of the possible numbers of rows of a block."""


@dataclass(frozen=True, kw_only=True)
class TaskBlocks:
    """Positions of rows of T tasks in blocks of one task each; the number of blocks does not depend on the tasks."""

    place: Tensor
    """Position of each of the N rows among the rows of all blocks, [N] int64."""
    task: Tensor
    """Task of each of the B = N // height + T blocks, [B] int64."""
    height: int
    """Number of rows of a block."""
    count: int
    """Number of tasks, T."""

    def gather(self, rows: Tensor) -> Tensor:
        """Return blocks [B, height, I] that contain the rows [N, I], padded with zeros."""
        flat = rows.new_zeros(len(self.task) * self.height, rows.shape[1])
        return flat.index_copy(0, self.place, rows).view(len(self.task), self.height, -1)

    def matrices(self, weight: Tensor) -> Tensor:
        """Return the matrix of each block's task, [B, O, I], from the matrices of the tasks, [T, O, I]."""
        if weight.is_contiguous():
            return weight[self.task]
        return weight.transpose(1, 2)[self.task].transpose(1, 2)  # in the order of memory: several times as fast

    def sum(self, products: Tensor) -> Tensor:
        """Return the sums [T, O, I] of values of blocks [B, O, I] over the blocks of each task."""
        member = functional.one_hot(self.task, self.count).to(products.dtype)
        return exact_matmul(member.t(), products.flatten(1)).view(-1, *products.shape[1:])

    def scatter(self, blocks: Tensor) -> Tensor:
        """Return the rows [N, I] that blocks [B, height, I] contain."""
        return blocks.flatten(0, 1)[self.place]


def task_blocks(task: Tensor, count: int) -> TaskBlocks:
    """Sort rows [N] of `count` tasks into blocks with about as many rows as a task has on average.

    Larger blocks would contain more padding, smaller ones would read the matrices of the tasks more often.
    """
    height = 2 ** min(max((len(task) // count).bit_length() - 1, LOWEST), HIGHEST)
    member = functional.one_hot(task, count)
    before = (member.cumsum(0) * member).sum(1) - 1  # earlier rows of the same task
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
    """The task of each of N rows, out of T tasks."""

    task: Tensor
    """Index of the task of each row, [N] int64."""
    count: int
    """Number of tasks, T."""
    kernels: bool = False
    """Whether products use the C++ kernels (`hydrazero.models.ops.kernels`, which must be loaded) or plain PyTorch."""

    @cached_property
    def blocks(self) -> TaskBlocks:
        """Positions in blocks of one task each, with which plain PyTorch multiplies rows of several tasks."""
        return task_blocks(self.task, self.count)

    def pick(self, table: Tensor) -> Tensor:
        """Return the entry of each row's task, [N, ...], of a table [T, ...]; its derivative needs no scatter."""
        flat = table.reshape(self.count, -1)
        member = functional.one_hot(self.task, self.count).to(table.dtype)
        return exact_matmul(member, flat).view(-1, *table.shape[1:])

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product of each row of x [N, I] with the matrix of its task in weight [T, O, I]: [N, O]."""
        if self.count == 1 and not self.kernels:
            return exact_linear(x, weight[0])
        return _TaskLinear.apply(x, weight.to(x.dtype), self)


class _TaskLinear(Function):
    """(x, W) -> W[task] x; it is bilinear and so are its derivatives, so the set is closed under differentiation."""

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
    """(g, x) -> the sum of g x^T over the rows of each task."""

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
    """Return x [N, F] unchanged, as the output of a linear layer that is the identity for every task.

    The gradient of `probe` [T, F, F] is that of the weights of such a layer, separately for each task, so one backward
    pass gives the gradients of all tasks for a shared layer. The values of `probe` are not used, and its gradient
    cannot be differentiated again.
    """
    return _Identity.apply(x, probe, rows)


class _Identity(Function):
    """(x, I) -> x; derivatives keep the identity, so that second derivatives contain the layer as well."""

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
        """Return [N, O] for rows [N, I], each row by the weights of its own task."""
        out = rows.matmul(x, self.weight)
        return out if self.bias is None else out + rows.pick(self.bias)

    def each_task(self, x: Tensor) -> Tensor:
        """Return [N, T, O] for rows [N, T, I] that each task has separately, by the weights of that task."""
        out = exact_matmul(x.transpose(0, 1), self.weight.transpose(1, 2)).transpose(0, 1)
        return out if self.bias is None else out + self.bias

    def all_tasks(self, x: Tensor) -> Tensor:
        """Return [N, T, O] for rows [N, I], each row by the weights of every task."""
        tasks, outputs, inputs = self.weight.shape
        bias = None if self.bias is None else self.bias.reshape(-1)
        return exact_linear(x, self.weight.reshape(-1, inputs), bias).view(-1, tasks, outputs)
