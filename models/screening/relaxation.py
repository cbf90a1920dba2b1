"""Relaxation of a screen's structures, many at once, with the forces of the first task, by torch-sim."""

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
from hydrazero.models.screening.settings import CHUNK, CONVERGED
from hydrazero.models.screening.sources import Item, read_structure
from hydrazero.models.task_facts import CONSERVATIVE
from hydrazero.shards.errors import ConfigError, HydrazeroError, StructureError
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.structure import Structure, check_structure

GROUP_ATOMS = 1024
"""Number of atoms that are relaxed together."""
FORCE_LIMIT = 0.05
"""Largest force, eV/Å, at which a relaxation ends; in a crystal also the largest force on the cell."""
CHECK_EVERY = 5
"""Number of steps between checks of the forces."""


class Relaxer:
    """Relax structures by FIRE (Bitzek 2006), and crystals together with their cells (Frechet cell filter)."""

    def __init__(self, potential: Potential, task: str, steps: int, max_atoms: int) -> None:
        """Relax for at most `steps` steps, and pass structures of more than `max_atoms` atoms on without a change.

        Raises ConfigError if the task's forces are not the gradient of its energy or depend on charge and spin,
        SourceError if torch-sim is not installed.
        """
        facts = potential.facts(task)
        if facts.forces != CONSERVATIVE:
            raise ConfigError(
                f"task '{task}' has no conservative forces to relax with; name a task that has them first."
            )
        if facts.charge_spin:
            raise ConfigError(
                f"task '{task}' depends on charge and spin, which relaxation by torch-sim ignores; relax with ASE."
            )
        self._sim = optional_module("torch_sim", "torch-sim-atomistic", "--relax", "torch-sim")
        from hydrazero.models.inference.torch_sim_model import TorchSimModel

        self.potential, self.task, self.steps, self.max_atoms = potential, task, steps, max_atoms
        self._model: Any = TorchSimModel(potential, task)

    def relaxed(self, structures: Sequence[Structure]) -> list[Structure]:
        """Return structures relaxed, each with a target CONVERGED.

        Either all must be periodic in three directions or none in any. Raises StructureError if a result is not a
        valid structure.
        """
        periodic = bool(structures[0].pbc.all())
        cells = [structure.cell if periodic else np.eye(3) for structure in structures]
        atoms = [Atoms(s.numbers, s.positions, cell=c, pbc=periodic) for s, c in zip(structures, cells, strict=True)]
        optimizer = getattr(self._sim.optimizers, "frechet_cell_fire" if periodic else "fire")
        state = self._sim.io.atoms_to_state(atoms, self._model.device, torch.float64)
        converged = self._sim.generate_force_convergence_fn(FORCE_LIMIT, include_cell_forces=periodic)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-sim warns at the step limit, which the target records
            done = self._sim.optimize(
                state,
                self._model,
                optimizer=optimizer,
                convergence_fn=converged,
                max_steps=self.steps,
                steps_between_swaps=min(CHECK_EVERY, self.steps),
            )
        flags, results = converged(done).tolist(), []
        for number, structure in enumerate(structures):
            positions = done.positions[done.system_idx == number].detach().cpu().numpy().astype(np.float64)
            cell = done.cell[number].T.detach().cpu().numpy().astype(np.float64) if periodic else structure.cell
            targets = {CONVERGED: np.array(float(flags[number]))}
            relaxed = replace(structure, positions=positions, cell=cell, targets=targets)
            check_structure(relaxed)
            results.append(relaxed)
        return results

    def items(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield each item with its structure relaxed; reading an item that failed raises its error."""
        waiting: dict[bool, list[tuple[Item, Structure]]] = {True: [], False: []}
        chunk = 0
        for item in items:
            if item.index // CHUNK != chunk:  # rows are written by complete chunks
                for group in waiting.values():
                    yield from self._relax_group(group)
                    group.clear()
                chunk = item.index // CHUNK
            try:
                structure = read_structure(item)
            except StructureError as error:
                yield replace(item, read=partial(_raise, error))
                continue
            if len(structure) > self.max_atoms:
                yield replace(item, read=partial(_same, structure))
                continue
            if self.potential.why_not(structure, self.task) is not None or structure.pbc.any() != structure.pbc.all():
                yield replace(item, read=partial(_raise, self._rejection_reason(structure)))
                continue
            group = waiting[bool(structure.pbc.all())]
            group.append((item, structure))
            if sum(len(each) for _, each in group) >= GROUP_ATOMS:
                yield from self._relax_group(group)
                group.clear()
        for group in waiting.values():
            yield from self._relax_group(group)

    def _rejection_reason(self, structure: Structure) -> StructureError:
        """Return the error for a structure that is not relaxed at all."""
        reason = self.potential.why_not(structure, self.task)
        if reason is not None:
            return StructureError("unseen", f"it {reason}")
        return StructureError("not_relaxed", "it is periodic in one or two directions, which --relax does not support")

    def _relax_group(self, group: Sequence[tuple[Item, Structure]]) -> Iterator[Item]:
        """Relax a group; if that fails, relax its halves, until memory suffices or the one that fails is known."""
        if not group:
            return
        try:
            results = self.relaxed([structure for _, structure in group])
        except (HydrazeroError, ValueError, torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
            if len(group) == 1:
                yield replace(group[0][0], read=partial(_raise, _not_relaxed(error)))
                return
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                yield from self._relax_group(half)
            return
        for (item, _), structure in zip(group, results, strict=True):
            yield replace(item, read=partial(_same, structure))


def _same(structure: Structure) -> Structure:
    return structure


def _raise(error: StructureError) -> Structure:
    raise error


def _not_relaxed(error: Exception) -> StructureError:
    if isinstance(error, torch.OutOfMemoryError):
        return StructureError("out_of_memory", "it does not fit into the GPU's memory")
    return StructureError("not_relaxed", f"its relaxation failed ({str(error).rstrip('.')})")
