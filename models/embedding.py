"""Initial node features of the atoms, before any message is passed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrazero.models.heads.task_linear import TaskRows
from hydrazero.models.ops.exact import ExactLinear, exact_matmul
from hydrazero.shards.structure import MAX_ATOMIC_NUMBER


@dataclass(frozen=True, kw_only=True)
class AtomConditions:
    """Properties of each of A atoms that condition its features, apart from its element."""

    rows: TaskRows
    """Index of the task of each atom, [A]."""
    charge: Tensor
    """Total charge of the atom's structure in e, [A]."""
    multiplicity: Tensor
    """Spin multiplicity 2S + 1 of the atom's structure, 0 where it is unknown, [A]."""


class AtomEmbedding(nn.Module):
    """A learned vector per element, plus vectors of charge, spin and task where they are switched on."""

    charged: Tensor
    """1 for tasks whose atoms depend on charge and spin, 0 for the others, [T]."""

    def __init__(self, features: int, charged: list[bool], *, of_tasks: bool) -> None:
        super().__init__()
        self.elements = nn.Parameter(torch.randn(MAX_ATOMIC_NUMBER, features))
        self.register_buffer("charged", torch.tensor(charged, dtype=torch.get_default_dtype()), persistent=False)
        self.charge_spin: nn.Sequential | None = None
        if any(charged):
            self.charge_spin = nn.Sequential(ExactLinear(3, features), nn.SiLU(), ExactLinear(features, features))
        self.tasks = nn.Parameter(0.1 * torch.randn(len(charged), features)) if of_tasks else None
        self.by_task = of_tasks or len(set(charged)) > 1
        """Whether the features of a structure depend on its task."""

    def forward(self, numbers: Tensor, conditions: AtomConditions) -> Tensor:
        """Return the initial node scalars [A, F] of atoms with atomic numbers [A]."""
        # A product with a one-hot matrix needs no scatter in its derivative; padding, with number 0, becomes zeros.
        member = functional.one_hot(numbers, MAX_ATOMIC_NUMBER + 1)[:, 1:].to(self.elements.dtype)
        embedded = exact_matmul(member, self.elements)
        if self.charge_spin is not None:
            known = (conditions.multiplicity > 0).to(embedded.dtype)
            unpaired = (conditions.multiplicity - 1).clamp(min=0).to(embedded.dtype)
            told = torch.stack([conditions.charge.to(embedded.dtype), unpaired, known], dim=-1)
            embedded = embedded + self.charge_spin(told) * conditions.rows.pick(self.charged).unsqueeze(-1)
        if self.tasks is not None:
            embedded = embedded + conditions.rows.pick(self.tasks)
        return embedded
