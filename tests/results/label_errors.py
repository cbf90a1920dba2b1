"""Errors of predicted energies and forces: of a whole split, and of the groups of structures that a table names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydrazero.trainer.records.task_errors import KEYS


@dataclass(frozen=True, kw_only=True)
class LabelErrors:
    """Predicted minus true labels of S structures."""

    names: Sequence[str]
    """Source ids, such as 'train_mixedT.xyz#12', [S]."""
    energies: NDArray[np.float64]
    """Errors of the energies in eV per atom, [S]."""
    forces: Sequence[NDArray[np.float64]]
    """Errors of the forces in eV/Å, an array [atoms, 3] for each structure."""

    def summary(self) -> dict[str, float]:
        """Return the number of structures, and mean absolute and root mean square errors in meV/atom and meV/Å."""
        forces = np.concatenate([each.reshape(-1) for each in self.forces])
        return {
            "structures": len(self.names),
            KEYS["energy_mae"]: 1000.0 * float(np.abs(self.energies).mean()),
            "energy_rmse_mev_per_atom": 1000.0 * float(np.sqrt(np.square(self.energies).mean())),
            KEYS["force_mae"]: 1000.0 * float(np.abs(forces).mean()),
            "force_rmse_mev_per_angstrom": 1000.0 * float(np.sqrt(np.square(forces).mean())),
        }

    def of_groups(self, groups: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Return the errors of each group; if there are any, a structure in none is an error of the table's TOML."""
        if not groups:
            return {}
        chosen: dict[str, list[int]] = {group["name"]: [] for group in groups}
        for index, name in enumerate(self.names):
            chosen[group_of(name, groups)].append(index)
        return {name: self._of(indices).summary() for name, indices in chosen.items() if indices}

    def _of(self, indices: Sequence[int]) -> LabelErrors:
        return LabelErrors(
            names=[self.names[index] for index in indices],
            energies=self.energies[list(indices)],
            forces=[self.forces[index] for index in indices],
        )


def group_of(source_id: str, groups: Sequence[dict[str, Any]]) -> str:
    """Return the group of a structure: `file` is that of its source, `frames` the first and last of its numbers."""
    file, _, number = source_id.rpartition("#")
    for group in groups:
        first, last = group.get("frames", (0, int(number)))
        if file == group["file"] and first <= int(number) <= last:
            return str(group["name"])
    raise SystemExit(
        f"structure {source_id} is in none of the groups of its dataset; correct them in the table's TOML."
    )
