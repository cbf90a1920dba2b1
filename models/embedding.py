"""First node features: what is known of an atom before any message."""

from __future__ import annotations

from torch import Tensor, nn

from hydrazero.shards.structure import MAX_ATOMIC_NUMBER


class AtomEmbedding(nn.Module):
    """A learned vector per element."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.elements = nn.Embedding(MAX_ATOMIC_NUMBER + 1, features, padding_idx=0)

    def forward(self, numbers: Tensor) -> Tensor:
        """Atomic numbers [A] -> first node scalars [A, F]."""
        embedded: Tensor = self.elements(numbers)
        return embedded
