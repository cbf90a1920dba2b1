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
from torch import Tensor

from hydrazero.models.inference.potential import Potential
from hydrazero.models.screening.constraints import box_of, freedom_of
from hydrazero.models.screening.samples import RejectedStructureError
from hydrazero.models.screening.settings import CHUNK, CONVERGED
from hydrazero.models.screening.sources import Item, read_structure
from hydrazero.models.task_facts import CONSERVATIVE
from hydrazero.shards.errors import ConfigError, HydrazeroError, StructureError
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.structure import FloatArray, Structure, check_structure

Kind = tuple[bool, bool]
"""Whether a structure is periodic in any direction, and whether its cell is relaxed."""

GROUP_ATOMS = 1024
"""Number of atoms that are relaxed together."""
FORCE_LIMIT = 0.05
"""Largest force, eV/Å, at which a relaxation ends; in a crystal also the largest force on the cell."""
CHECK_EVERY = 5
"""Number of steps between checks of the forces."""


class Relaxer:
    """Relax structures by FIRE (Bitzek 2006), and crystals together with their cells (Frechet cell filter).

    Constraints on single atoms are kept, and so are the cells of structures that have any. Other cells are strained
    along periodic directions alone, without vacuum; see `freedom_of`.
    """

    def __init__(self, potential: Potential, tasks: Sequence[str], steps: int, max_atoms: int) -> None:
        """Relax with the first of the tasks of a screen, for at most `steps` steps.

        Structures of more than `max_atoms` atoms are passed on without a change. Raises ConfigError if the task's
        forces are not the gradient of its energy, SourceError if torch-sim is not installed.
        """
        task = tasks[0]
        if potential.facts(task).forces != CONSERVATIVE:
            raise ConfigError(
                f"task '{task}' has no conservative forces to relax with; name a task that has them first."
            )
        self._sim = optional_module("torch_sim", "torch-sim-atomistic", "--relax", "torch-sim")
        from hydrazero.models.inference.torch_sim_model import TorchSimModel

        self.potential, self.tasks, self.task = potential, tasks, task
        self.steps, self.max_atoms = steps, max_atoms
        self._model: Any = TorchSimModel(potential, task)

    def kind(self, structure: Structure) -> Kind:
        """Return whether a structure is periodic at all, and whether its cell is relaxed; others relax separately.

        Raises StructureError for a structure that cannot be relaxed.
        """
        if (reason := self.potential.why_none(structure, self.tasks)) is not None:
            raise StructureError("unseen", reason)
        if (reason := self.potential.why_not(structure, self.task)) is not None:
            raise StructureError("unseen", f"{reason}, and --relax needs that task")
        return bool(structure.pbc.any()), bool(freedom_of(structure, self.potential.cutoff).strain.any())

    def relaxed(self, structures: Sequence[Structure]) -> list[Structure]:
        """Return structures of one kind relaxed, each with a target CONVERGED.

        Raises StructureError if a result is not a valid structure.
        """
        periodic, strained = self.kind(structures[0])
        boxes = [box_of(structure, self.potential.cutoff) for structure in structures]
        pairs = list(zip(structures, boxes, strict=True))
        atoms = [Atoms(each.numbers, each.positions, cell=box, pbc=periodic) for each, box in pairs]
        model = _Restrained(self._model, self.potential.cutoff, structures)
        optimizer = getattr(self._sim.optimizers, "frechet_cell_fire" if strained else "fire")
        converged = self._sim.generate_force_convergence_fn(FORCE_LIMIT, include_cell_forces=strained)
        state = self._sim.io.atoms_to_state(atoms, model.device, torch.float64)
        results: list[Structure] = []
        for (structure, box), (done, flag) in zip(pairs, self._run(state, model, optimizer, converged), strict=True):
            positions = done.positions.detach().cpu().numpy().astype(np.float64)
            cell = structure.cell.copy()
            if strained:
                cell[structure.pbc] = done.cell[0].T.detach().cpu().numpy().astype(np.float64)[structure.pbc]
            targets = {CONVERGED: np.array(float(flag))}
            relaxed = replace(structure, positions=positions, cell=cell, targets=targets)
            check_structure(relaxed)
            _check_room(relaxed, box, self.potential.cutoff)
            results.append(relaxed)
        return results

    def _run(self, state: Any, model: _Restrained, optimizer: Any, converged: Any) -> list[tuple[Any, bool]]:
        """Return the last state of each system, and whether it has converged; systems that have take no more steps."""
        begin, step = optimizer(model=model)
        found: dict[int, tuple[Any, bool]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each row says what these warnings would
            state, taken = begin(state), 0
            while True:
                flags = converged(state).tolist()
                last = taken >= self.steps
                ended = [place for place, flag in enumerate(flags) if flag or last]
                if ended:
                    states = state.split() if len(ended) == len(flags) else state.pop(ended)
                    found |= {model.systems[n]: (done, flags[n]) for n, done in zip(ended, states, strict=True)}
                    model.keep([n for place, n in enumerate(model.systems) if place not in ended])
                if not model.systems:
                    return [found[number] for number in range(len(found))]
                for _ in range(min(CHECK_EVERY, self.steps - taken)):
                    state = step(state)
                    taken += 1

    def items(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield each item with its structure relaxed; reading an item that failed raises its error."""
        waiting: dict[Kind, list[tuple[Item, Structure]]] = {}
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
            try:
                kind = self.kind(structure)
            except StructureError as error:
                yield _rejected(item, structure, error)
                continue
            group = waiting.setdefault(kind, [])
            group.append((item, structure))
            if sum(len(each) for _, each in group) >= GROUP_ATOMS:
                yield from self._relax_group(group)
                group.clear()
        for group in waiting.values():
            yield from self._relax_group(group)

    def _relax_group(self, group: Sequence[tuple[Item, Structure]]) -> Iterator[Item]:
        """Relax a group; if that fails, relax its halves, until memory suffices or the one that fails is known."""
        if not group:
            return
        try:
            results = self.relaxed([structure for _, structure in group])
        except (HydrazeroError, ValueError, torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
            if len(group) == 1:
                yield _rejected(*group[0], _not_relaxed(error))
                return
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                yield from self._relax_group(half)
            return
        for (item, _), structure in zip(group, results, strict=True):
            yield replace(item, read=partial(_same, structure))


class _Restrained:
    """A torch-sim model of the systems that are left, without the forces and stresses that must not act on them."""

    def __init__(self, model: Any, cutoff: float, structures: Sequence[Structure]) -> None:
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self._structures = structures
        self._freedoms = [freedom_of(structure, cutoff) for structure in structures]
        self.systems: list[int] = []
        """Numbers of the structures that are the systems of the state."""
        self.keep(list(range(len(structures))))

    def keep(self, systems: list[int]) -> None:
        """Set the numbers of the structures that are left."""
        self.systems = systems
        if systems:
            freedoms = [self._freedoms[number] for number in systems]
            self._atoms = torch.from_numpy(np.concatenate([each.atoms for each in freedoms])).to(self.device)
            self._strain = torch.from_numpy(np.stack([each.strain for each in freedoms])).to(self.device)

    def __call__(self, state: Any) -> dict[str, Tensor]:
        """Return the model's results for a state; charge and spin, which states do not hold, are those of the files."""
        structures = [self._structures[number] for number in self.systems]
        charge, spin = ([getattr(s, name) for s in structures] for name in ("charge", "multiplicity"))
        out: dict[str, Tensor] = self.model({**vars(state), "charge": charge, "spin": spin})
        out["forces"] = torch.einsum("aij,aj->ai", self._atoms, out["forces"])
        if "stress" in out:
            out["stress"] = self._strain @ out["stress"] @ self._strain
        return out


def _check_room(structure: Structure, box: FloatArray, cutoff: float) -> None:
    """Raise StructureError if a structure has grown into its images along a direction without periodicity."""
    if structure.pbc.any():
        for vector in box[~structure.pbc]:
            length = np.linalg.norm(vector)
            if np.ptp(structure.positions @ (vector / length)) + cutoff > length:
                raise StructureError("not_relaxed", "its relaxation has driven its atoms apart")


def _same(structure: Structure) -> Structure:
    return structure


def _raise(error: StructureError) -> Structure:
    raise error


def _rejected(item: Item, structure: Structure, error: StructureError) -> Item:
    """Return an item whose structure is not computed because of an error; its row names the structure."""
    return replace(item, read=partial(_raise, RejectedStructureError(structure, error.reason, str(error))))


def _not_relaxed(error: Exception) -> StructureError:
    if isinstance(error, torch.OutOfMemoryError):
        return StructureError("out_of_memory", "it does not fit into the GPU's memory")
    return StructureError("not_relaxed", f"its relaxation failed ({str(error).rstrip('.')})")
