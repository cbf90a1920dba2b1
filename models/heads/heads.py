"""Heads, which turn node features into quantities, with separate weights for every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.encoders.base import NodeFeatures, PairGeometry
from hydrazero.models.heads.task_linear import TaskLinear, TaskRows
from hydrazero.models.ops.exact import exact_matmul
from hydrazero.models.ops.slots import Segments

ATTENTION_RANGE = 5.0
"""Limit of the attention logits; within it, exponentials need no subtraction of the maximum."""


@dataclass(frozen=True, kw_only=True)
class HeadSize:
    """Sizes that all heads of a model have in common."""

    tasks: int
    """Number of tasks, T."""
    features: int
    """Number of node features, F."""
    hidden: int
    """Width of the hidden layers, H."""
    layers: int = 1
    """Number of hidden layers."""


class ScalarHead(nn.Module):
    """One perceptron per task, from node scalars to M numbers per atom."""

    def __init__(self, size: HeadSize, outputs: int = 1) -> None:
        super().__init__()
        self.first = TaskLinear(size.tasks, size.features, size.hidden)
        self.between = nn.ModuleList(TaskLinear(size.tasks, size.hidden, size.hidden) for _ in range(size.layers - 1))
        self.second = TaskLinear(size.tasks, size.hidden, outputs)

    def forward(self, scalars: Tensor, rows: TaskRows) -> Tensor:
        """Return [A, M] for node scalars [A, F], each atom by the head of its own task."""
        hidden = functional.silu(self.first(scalars, rows))
        for layer in self.between:
            hidden = functional.silu(layer(hidden, rows))
        return self.second(hidden, rows)

    def all_tasks(self, scalars: Tensor) -> Tensor:
        """Return [A, T, M] for node scalars [A, F], every atom by the head of every task."""
        hidden = functional.silu(self.first.all_tasks(scalars))
        for layer in cast("Sequence[TaskLinear]", self.between):
            hidden = functional.silu(layer.each_task(hidden))
        # One sum over the hidden features for each of the few outputs avoids an array [A, T, M, H].
        outputs = [(hidden * weight).sum(-1) for weight in self.second.weight.unbind(1)]
        bias = 0.0 if self.second.bias is None else self.second.bias
        return torch.stack(outputs, dim=-1) + bias


class VectorHead(nn.Module):
    """One vector per atom: vector features mixed per task and gated by the scalars (Schütt et al. 2021, sec. 3.4)."""

    def __init__(self, size: HeadSize) -> None:
        super().__init__()
        self.gates = ScalarHead(size, size.hidden)
        self.mix = TaskLinear(size.tasks, size.features, size.hidden, bias=False)

    def mixed(self, vectors: Tensor, rows: TaskRows) -> Tensor:
        """Return mixed vectors [A, 3, H] of node vectors [A, 3, F]."""
        atoms, _, features = vectors.shape
        three = TaskRows(task=rows.task.repeat_interleave(3), count=rows.count, kernels=rows.kernels)
        return self.mix(vectors.reshape(3 * atoms, features), three).view(atoms, 3, -1)

    def forward(self, scalars: Tensor, vectors: Tensor, rows: TaskRows) -> Tensor:
        """Return one vector per atom, [A, 3], from node scalars [A, F] and node vectors [A, 3, F]."""
        return (self.mixed(vectors, rows) * self.gates(scalars, rows).unsqueeze(1)).sum(-1)


class VirialHead(nn.Module):
    """One symmetric matrix per atom: a multiple of the identity, gated products of mixed vectors, and a sum over pairs.

    A pair along u contributes a multiple of u u^T, as in the virial of pair forces. Where all sites are centres of
    inversion, all node vectors are zero, and only the pairs distinguish a sheared crystal from a compressed one.
    """

    def __init__(self, size: HeadSize, radial: int) -> None:
        """Create the head; `radial` is the number of radial functions of a pair, including the cutoff function."""
        super().__init__()
        self.vectors = VectorHead(size)
        self.pressure = ScalarHead(size)
        self.pairs = ScalarHead(size, radial)

    def forward(self, features: NodeFeatures, rows: TaskRows, pairs: PairGeometry) -> Tensor:
        """Return one matrix per atom, [A, 3, 3], from scalars [A, F], vectors [A, 3, F] and pairs in R rows."""
        scalars, vectors = features.scalars, features.vectors
        if vectors is None:
            raise ValueError("a direct stress needs node vectors, which the encoder does not have.")
        mixed = self.vectors.mixed(vectors, rows)
        products = exact_matmul(mixed * self.vectors.gates(scalars, rows).unsqueeze(1), mixed.transpose(1, 2))
        identity = torch.eye(3, dtype=scalars.dtype, device=scalars.device)
        return products + self.pressure(scalars, rows).unsqueeze(-1) * identity + self._of_pairs(scalars, rows, pairs)

    def _of_pairs(self, scalars: Tensor, rows: TaskRows, pairs: PairGeometry) -> Tensor:
        atomic, slots = self.pairs(scalars, rows), pairs.slots
        both = slots.spread(atomic).unsqueeze(1) + slots.gather(atomic)  # symmetric in the two atoms of a pair
        strength = (pairs.radial * both).sum(-1, keepdim=True)
        return slots.sum_rows(exact_matmul(pairs.directions.transpose(1, 2), strength * pairs.directions))


class PooledHead(nn.Module):
    """One intensive number per structure: a mean over its atoms, weighted by attention or not."""

    def __init__(self, size: HeadSize, *, attention: bool) -> None:
        super().__init__()
        self.values = ScalarHead(size)
        self.logits = ScalarHead(size) if attention else None

    def forward(self, scalars: Tensor, rows: TaskRows, structures: Segments, atom_mask: Tensor) -> Tensor:
        """Return one number per structure, [S], from node scalars [A, F]; 0 for a structure without atoms."""
        weight = atom_mask.to(scalars.dtype)
        if self.logits is not None:
            logits = ATTENTION_RANGE * torch.tanh(self.logits(scalars, rows).squeeze(-1) / ATTENTION_RANGE)
            weight = weight * torch.exp(logits)
        total = structures.sum(weight)
        pooled = structures.sum(weight * self.values(scalars, rows).squeeze(-1))
        return pooled / torch.where(total > 0, total, torch.ones_like(total))
