"""Heads: one set of parameters with a leading task dimension, so that every rank does the same work (ZeRO needs it)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class StackedEnergyHead(nn.Module):
    """A two-layer perceptron per task, from node scalars to an atomic energy in units of the task's scale.

    All tasks' first layers are one matrix product; an atom then keeps the slice of its structure's task.
    """

    def __init__(self, tasks: int, features: int, hidden: int) -> None:
        super().__init__()
        self.tasks, self.hidden = tasks, hidden
        self.weight_in = nn.Parameter(torch.empty(tasks, hidden, features))
        self.bias_in = nn.Parameter(torch.zeros(tasks, hidden))
        self.weight_out = nn.Parameter(torch.empty(tasks, hidden))
        self.bias_out = nn.Parameter(torch.zeros(tasks))
        bound = 1.0 / math.sqrt(features)
        nn.init.uniform_(self.weight_in, -bound, bound)
        nn.init.uniform_(self.weight_out, -1.0 / math.sqrt(hidden), 1.0 / math.sqrt(hidden))

    def _hidden(self, scalars: Tensor) -> Tensor:
        """Scalars [A, F] -> activations of every task [A, T, H]."""
        flat = self.weight_in.reshape(self.tasks * self.hidden, -1)
        pre = functional.linear(scalars, flat, self.bias_in.reshape(-1))
        return functional.silu(pre).view(-1, self.tasks, self.hidden)

    def all_tasks(self, scalars: Tensor) -> Tensor:
        """Node scalars [A, F] -> scaled atomic energies of every task [A, T]."""
        return (self._hidden(scalars) * self.weight_out).sum(-1) + self.bias_out

    def forward(self, scalars: Tensor, atom_task: Tensor) -> Tensor:
        """Node scalars [A, F], task of each atom [A] -> scaled atomic energies [A]."""
        return self.all_tasks(scalars).gather(1, atom_task.unsqueeze(1)).squeeze(1)
