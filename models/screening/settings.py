"""Settings of a screen, and constants that several modules of this package share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CHUNK = 1024
"""Number of structures in a chunk, the unit of work: one reader reads a chunk, and a resumed screen skips or repeats
complete chunks."""
CONVERGED = "converged"
"""Name of a column, and of a target of relaxed structures: whether the forces fell below the limit before the maximum
number of steps."""
TOO_CLOSE = "too_close_"
"""Prefix of the columns that say whether atoms are closer than any of their elements in the training data of a task."""


@dataclass(frozen=True, kw_only=True)
class ScreenSettings:
    """Settings on which the rows of a screen depend."""

    tasks: tuple[str, ...]
    """Tasks whose heads are applied. The first one ranks the structures unless `by` is given."""
    forces: tuple[str, ...] = ()
    """Tasks, among `tasks`, that also give forces. Each costs one pass with derivatives."""
    top: int | None = None
    """Number of structures to keep, those with the lowest value of `by`; None keeps all."""
    by: str = ""
    """Expression of columns that ranks the structures. By default it is the first task's energy above its reference
    energies, per atom."""
    max_atoms: int = 10_000
    """Maximum number of atoms; larger structures are not computed."""
    relax: int = 0
    """Maximum number of steps by which the first task relaxes each structure before all tasks are applied; 0 does not
    relax."""

    @property
    def ranking(self) -> str:
        """The expression that ranks the structures."""
        return self.by or f"interaction_per_atom_{self.tasks[0]}"

    def record(self) -> dict[str, Any]:
        """Return the settings and the chunk size as plain types, for comparison when a screen is resumed."""
        return {**asdict(self), "tasks": list(self.tasks), "forces": list(self.forces), "chunk": CHUNK}
