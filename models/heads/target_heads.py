"""Heads of the quantities other than energy, forces and stress: one head per target, stacked over the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hydrazero.models.encoders.base import NodeFeatures
from hydrazero.models.heads.heads import HeadSize, PooledHead, ScalarHead, VectorHead
from hydrazero.models.heads.task_linear import TaskRows
from hydrazero.models.ops.slots import Segments
from hydrazero.models.task_facts import TargetFacts, TaskFacts, targets_of
from hydrazero.shards.errors import ConfigError, did_you_mean


class TargetHeads(nn.Module):
    """The heads of all targets that any of the tasks has."""

    def __init__(self, tasks: Sequence[TaskFacts], size: HeadSize, attention_targets: Sequence[str]) -> None:
        super().__init__()
        self.facts = targets_of(tasks)
        self.heads = nn.ModuleDict(
            {
                # The prefix avoids names of attributes of ModuleDict, which it does not accept as keys.
                f"target_{name}": _head(facts, size, name in attention_targets)
                for name, facts in self.facts.items()
            }
        )
        for name in self.facts:
            own = [task.targets.get(name, TargetFacts(of="", kind="")) for task in tasks]
            table = torch.tensor([[facts.mean, facts.scale] for facts in own])
            # Not persistent: they are stored once, in the facts of the tasks.
            self.register_buffer(f"statistics_{name}", table, persistent=False)

    def forward(
        self, features: NodeFeatures, rows: TaskRows, structures: Segments, atom_mask: Tensor
    ) -> dict[str, Tensor]:
        """Return all targets, each by the head of the structure's task: [S], [S, 3], [A] or [A, 3]."""
        return {name: self._one(name, features, rows, structures, atom_mask) for name in self.facts}

    def _one(
        self, name: str, features: NodeFeatures, rows: TaskRows, structures: Segments, atom_mask: Tensor
    ) -> Tensor:
        facts, head = self.facts[name], self.heads[f"target_{name}"]
        statistics = rows.pick(getattr(self, f"statistics_{name}"))
        mean, scale = statistics[:, 0], statistics[:, 1]
        mask = atom_mask.to(features.scalars.dtype)
        if isinstance(head, VectorHead):
            atomic = head(features.scalars, features.vectors, rows) * (scale * mask).unsqueeze(1)
            return structures.sum(atomic) if facts.of == "structure" else atomic
        if isinstance(head, PooledHead):
            # All atoms of a structure have the same task, so a mean over them returns the values of that task.
            atoms = structures.sum(mask).clamp(min=1)
            mean, scale = structures.sum(mean * mask) / atoms, structures.sum(scale * mask) / atoms
            pooled: Tensor = head(features.scalars, rows, structures, atom_mask)
            return pooled * scale + mean
        atomic = (head(features.scalars, rows).squeeze(-1) * scale + mean) * mask
        return structures.sum(atomic) if facts.of == "structure" else atomic


def _head(facts: TargetFacts, size: HeadSize, attention: bool) -> nn.Module:
    if facts.kind == "vector":
        return VectorHead(size)
    if facts.of == "structure" and not facts.extensive:
        return PooledHead(size, attention=attention)
    return ScalarHead(size)


def check_attention(targets: dict[str, TargetFacts], attention_targets: Sequence[str]) -> None:
    """Raise ConfigError if a target with attention is unknown or is not a mean over atoms."""
    for name in attention_targets:
        if name not in targets:
            raise ConfigError(f"target '{name}' is not known{did_you_mean(name, list(targets))}.")
        facts = targets[name]
        if facts.of != "structure" or facts.kind != "scalar" or facts.extensive:
            raise ConfigError(f"target '{name}' is not a mean over atoms, so it cannot have attention.")
