"""Linear layers with weights of their own for every task: one parameter with a leading task dimension.

A module per task would give ranks that see different tasks different work, which ZeRO takes for granted not to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from hydrazero.models.exact import exact_linear, exact_matmul


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """Which of T tasks each of N rows belongs to."""

    task: Tensor
    """[N] int64."""
    count: int
    """T."""
    kernels: bool = False
    """Whether products are those of `hydrazero.models.kernels`, which must be loaded, or plain PyTorch's."""

    def pick(self, table: Tensor) -> Tensor:
        """Return each row's task's entry of a table: [T, ...] -> [N, ...], differentiable without a scatter."""
        flat = table.reshape(self.count, -1)
        member = functional.one_hot(self.task, self.count).to(table.dtype)
        return exact_matmul(member, flat).view(-1, *table.shape[1:])

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply each row with its task's matrix: x [N, I], weight [T, O, I] -> [N, O]."""
        if self.kernels:
            return _TaskLinear.apply(x, weight.to(x.dtype), self)
        every = exact_linear(x, weight.reshape(-1, weight.shape[2])).view(-1, *weight.shape[:2])
        index = self.task.view(-1, 1, 1).expand(-1, 1, weight.shape[1])
        return every.gather(1, index).squeeze(1)


class _TaskLinear(Function):
    """(x, W) -> W[task] x; like its derivatives bilinear, so closed under differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: TaskRows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight)
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
        if not rows.kernels:
            member = functional.one_hot(rows.task, rows.count).to(g.dtype)
            return torch.stack([exact_matmul((g * of_task.unsqueeze(1)).t(), x) for of_task in member.unbind(1)])
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

    def all_tasks(self, x: Tensor) -> Tensor:
        """Rows [N, I] -> [N, T, O], by every task."""
        tasks, outputs, inputs = self.weight.shape
        bias = None if self.bias is None else self.bias.reshape(-1)
        return exact_linear(x, self.weight.reshape(-1, inputs), bias).view(-1, tasks, outputs)
