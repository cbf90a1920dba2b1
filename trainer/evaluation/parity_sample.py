"""A sample of the predictions of an evaluation, for parity plots while a run is in progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hydrazero.models.atomistic import Predictions
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.trainer.engine.losses import Objective
from hydrazero.trainer.ranks.distributed import gather_objects, ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

KEPT = 1000
"""Approximate number of structures, and of atoms with forces, of each task that all ranks keep together."""


class ParitySample:
    """The first predictions of each task on each rank; shards hold structures in a random order."""

    def __init__(self, tasks: Sequence[str], objective: Objective) -> None:
        self.tasks, self.objective = list(tasks), objective
        self.quota = -(-KEPT // ranks())
        self._rows: dict[str, list[NDArray[np.float64]]] = {}
        """Labels and predictions, [n, 1 or 3, 2], under 'energy/TASK' or 'forces/TASK'."""

    def add(self, batch: GraphBatch, predictions: Predictions) -> None:
        """Keep predictions of a batch until there are enough."""
        atoms = batch.n_atoms.clamp(min=1)
        energies = ((batch.energy - predictions.reference) / atoms, predictions.interaction / atoms)
        self._keep("energy", batch.task, batch.energy_mask, energies)
        of_atoms = batch.task[batch.structure]
        self._keep("forces", of_atoms, batch.forces_mask, (batch.forces, predictions.forces))

    def _keep(self, quantity: str, task: Tensor, mask: Tensor, values: tuple[Tensor, Tensor]) -> None:
        """Keep labels and predictions, [n] or [n, 3], of structures or atoms whose task predicts the quantity."""
        mask = mask & self.objective.predicted[:, self.objective.quantities.index(quantity)][task]
        for number, name in enumerate(self.tasks):
            rows = self._rows.setdefault(f"{quantity}/{name}", [])
            room = self.quota - sum(len(part) for part in rows)
            if room <= 0:
                continue
            chosen = (mask & (task == number)).nonzero()[:room, 0]
            true, predicted = (value[chosen].detach().double().cpu().numpy() for value in values)
            both = np.stack([true, predicted], axis=-1)  # [n, 2] or [n, 3, 2]
            rows.append(both[:, np.newaxis] if both.ndim == 2 else both)

    def gathered(self) -> ParitySample:
        """Return the samples of all ranks together; every rank must call this."""
        mine = {name: np.concatenate(parts) for name, parts in self._rows.items() if parts}
        everybody: list[dict[str, Any]] = gather_objects(mine)
        whole = ParitySample(self.tasks, self.objective)
        for theirs in everybody:
            for name, rows in theirs.items():
                whole._rows.setdefault(name, []).append(rows)
        return whole

    def figures(self) -> dict[str, Figure]:
        """Return a figure of each task that has labels, by its tag in TensorBoard."""
        from hydrazero.trainer.plots.parity import Parity, parity_plots

        figures = {}
        for name in self.tasks:
            energy, forces = (self._joined(f"{quantity}/{name}") for quantity in ("energy", "forces"))
            if len(energy) or len(forces):
                parity = Parity(
                    energy=energy[:, 0],
                    energy_predicted=energy[:, 1],
                    forces=forces[:, 0],
                    forces_predicted=forces[:, 1],
                )
                figures[f"parity/{name}"] = parity_plots({name: parity})
        return figures

    def _joined(self, key: str) -> NDArray[np.float64]:
        """Return labels and predictions, [n, 2]."""
        parts = self._rows.get(key, [])
        return np.concatenate(parts).reshape(-1, 2) if parts else np.zeros((0, 2))
