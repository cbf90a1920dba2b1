"""Relaxation on the way: structures of a screen in batches, by the first task's forces, through torch-sim."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from ase import Atoms

from hydrazero.models.inference.potential import Potential
from hydrazero.models.screening.settings import CHUNK, REACHED
from hydrazero.models.screening.sources import Item, structure_at
from hydrazero.models.task_facts import CONSERVATIVE
from hydrazero.shards.errors import ConfigError, HydrazeroError, StructureError
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.structure import Structure, check_structure

AT_ONCE = 1024
"""Atoms that are relaxed together."""
CONVERGED = 0.05
"""eV/Å: largest force, and of a crystal the largest force on its cell, at which a relaxation ends."""
CHECK_EVERY = 5
"""Steps between looks at the forces."""


class Relaxer:
    """Relaxes structures by FIRE (Bitzek 2006), crystals with their cells (Frechet filter), for at most some steps."""

    def __init__(self, potential: Potential, task: str, steps: int, max_atoms: int) -> None:
        """Structures of more than `max_atoms` atoms are passed on as they are.

        Raise ConfigError for a task whose forces are not the energy's gradient, or where torch-sim is missing."""
        facts = potential.facts(task)
        if facts.forces != CONSERVATIVE:
            raise ConfigError(f"task '{task}' has no conservative forces to relax with; name one first that has.")
        if facts.charge_spin:
            raise ConfigError(f"task '{task}' depends on charge and spin, torch-sim does not: relax with ASE.")
        self._sim = optional_module("torch_sim", "torch-sim-atomistic", "--relax", "torch-sim")
        from hydrazero.models.inference.torch_sim_model import TorchSimModel

        self.potential, self.task, self.steps, self.max_atoms = potential, task, steps, max_atoms
        self._model: Any = TorchSimModel(potential, task)

    def relaxed(self, structures: Sequence[Structure]) -> list[Structure]:
        """Relax structures that are all periodic in three directions, or all of them not; raises StructureError.

        Each has a target REACHED."""
        periodic = bool(structures[0].pbc.all())
        cells = [structure.cell if periodic else np.eye(3) for structure in structures]
        atoms = [Atoms(s.numbers, s.positions, cell=c, pbc=periodic) for s, c in zip(structures, cells, strict=True)]
        optimizer = getattr(self._sim.optimizers, "frechet_cell_fire" if periodic else "fire")
        state = self._sim.io.atoms_to_state(atoms, self._model.device, torch.float64)
        small = self._sim.generate_force_convergence_fn(CONVERGED, include_cell_forces=periodic)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the most steps were taken is said of each structure
            done = self._sim.optimize(
                state,
                self._model,
                optimizer=optimizer,
                convergence_fn=small,
                max_steps=self.steps,
                steps_between_swaps=min(CHECK_EVERY, self.steps),
            )
        reached, found = small(done).tolist(), []
        for number, structure in enumerate(structures):
            positions = done.positions[done.system_idx == number].detach().cpu().numpy().astype(np.float64)
            cell = done.cell[number].T.detach().cpu().numpy().astype(np.float64) if periodic else structure.cell
            targets = {REACHED: np.array(float(reached[number]))}
            relaxed = replace(structure, positions=positions, cell=cell, targets=targets)
            check_structure(relaxed)
            found.append(relaxed)
        return found

    def items(self, items: Iterable[Item]) -> Iterator[Item]:
        """Give each item with its structure relaxed; what cannot be read or relaxed raises when it is read."""
        waiting: dict[bool, list[tuple[Item, Structure]]] = {True: [], False: []}
        chunk = 0
        for item in items:
            if item.index // CHUNK != chunk:  # which is written when it is whole
                for group in waiting.values():
                    yield from self._all(group)
                    group.clear()
                chunk = item.index // CHUNK
            try:
                structure = structure_at(item)
            except StructureError as error:
                yield replace(item, read=partial(_raise, error))
                continue
            if len(structure) > self.max_atoms:
                yield replace(item, read=partial(_same, structure))
                continue
            if self.potential.why_not(structure, self.task) is not None or structure.pbc.any() != structure.pbc.all():
                yield replace(item, read=partial(_raise, self._refusal(structure)))
                continue
            group = waiting[bool(structure.pbc.all())]
            group.append((item, structure))
            if sum(len(each) for _, each in group) >= AT_ONCE:
                yield from self._all(group)
                group.clear()
        for group in waiting.values():
            yield from self._all(group)

    def _refusal(self, structure: Structure) -> StructureError:
        """Say why a structure is not even tried."""
        reason = self.potential.why_not(structure, self.task)
        if reason is not None:
            return StructureError("unseen", f"it {reason}")
        return StructureError("not_relaxed", "it is periodic in one or two directions, which --relax does not do")

    def _all(self, group: Sequence[tuple[Item, Structure]]) -> Iterator[Item]:
        """Relax together; if that fails in halves, so that the one at fault is known, and memory suffices."""
        if not group:
            return
        try:
            found = self.relaxed([structure for _, structure in group])
        except (HydrazeroError, ValueError, torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
            if len(group) == 1:
                yield replace(group[0][0], read=partial(_raise, _not_relaxed(error)))
                return
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                yield from self._all(half)
            return
        for (item, _), structure in zip(group, found, strict=True):
            yield replace(item, read=partial(_same, structure))


def _same(structure: Structure) -> Structure:
    return structure


def _raise(error: StructureError) -> Structure:
    raise error


def _not_relaxed(error: Exception) -> StructureError:
    if isinstance(error, torch.OutOfMemoryError):
        return StructureError("out_of_memory", "it does not fit into the GPU's memory")
    return StructureError("not_relaxed", f"its relaxation fell apart ({str(error).rstrip('.')})")
