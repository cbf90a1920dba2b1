"""The model at work in a screen: eager at first, compiled when there is much to do; and columns of what it gives."""

from __future__ import annotations

import time
import warnings
from collections import deque
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.potential import Potential
from hydrazero.models.ops.compiled import CompilationError, CompiledModel, use_kernels
from hydrazero.models.screening.lookup import Refused, Rows
from hydrazero.models.screening.settings import REACHED, ScreenSettings, number_columns, schema_of
from hydrazero.shards.graphs.graph import GraphBatch


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the model gives for a batch of S structures and A atoms, still on its device."""

    members: Tensor
    """Energies by every head of the model and member of its ensemble, eV, [S, heads, M] float64."""
    forces: dict[str, Tensor]
    """Task -> eV/Å, [A, 3]."""
    atoms: Tensor
    """Atoms of each structure, [S]."""


class Predictor:
    """Computes batches; `seconds` is what the model alone took."""

    def __init__(self, potential: Potential, settings: ScreenSettings, compile_after: float) -> None:
        """The model is compiled once it has worked for `compile_after` seconds, if as much is left to do."""
        self.potential, self.settings, self.compile_after = potential, settings, compile_after
        self.left = float("inf")
        """Of the whole work, what is still to do over what is done; infinite while nobody knows."""
        self._of_forces = [(task, potential.task_index(task)) for task in settings.forces]
        self._compiled: CompiledModel | None = None
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0
        self.compiling = 0.0
        """Seconds that the compiler took."""

    @property
    def seconds(self) -> float:
        """Of the model alone, without reading, copies and compilation."""
        self._settle()
        return self._seconds

    def _settle(self) -> None:
        while self._events and self._events[0][1].query():  # no waiting for what is not done
            first, last = self._events.popleft()
            self._seconds += first.elapsed_time(last) / 1e3

    def __call__(self, batch: GraphBatch, *, usual: bool) -> Found:
        """Compute a batch that is on the model's device; only those of the usual shape are worth compiling."""
        model = self._model(batch) if usual else self.potential.model
        on_gpu = self.potential.device.type == "cuda"
        if on_gpu:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
        started = time.perf_counter()
        found = self._compute(model, batch)
        if on_gpu:
            last.record()
            self._events.append((first, last))
            self._settle()  # or they would pile up, two a batch
        else:
            self._seconds += time.perf_counter() - started
        return found

    def _compute(self, model: CompiledModel | AtomisticModel, batch: GraphBatch) -> Found:
        forces: dict[str, Tensor] = {}
        members: Tensor | None = None
        for task, index in self._of_forces:
            batch.task = torch.full_like(batch.task, index)
            members, forces[task] = model.members_and_forces(batch)
        if members is None:
            members = model.members_of_all_tasks(batch)
        return Found(members=members, forces=forces, atoms=batch.n_atoms)

    def _model(self, batch: GraphBatch) -> CompiledModel | AtomisticModel:
        if self._compiled is not None:
            return self._compiled
        if self.seconds < self.compile_after or self.seconds * self.left < self.compile_after:
            return self.potential.model
        started = time.perf_counter()
        model = self.potential.model
        try:
            if reason := use_kernels(model):
                raise CompilationError(reason)
            compiled = CompiledModel(model)
            self._compute(compiled, batch)
            self._compiled = compiled
        except CompilationError as error:
            warnings.warn(f"the model cannot be compiled here and stays slower: {error}", stacklevel=2)
            model.kernels, self.compile_after = False, float("inf")
            return model
        finally:
            self.compiling += time.perf_counter() - started
        return self._compiled


class Columns:
    """Tables of a screen's rows."""

    def __init__(self, potential: Potential, settings: ScreenSettings) -> None:
        self.potential, self.settings = potential, settings
        self.schema = schema_of(potential, settings)
        self.numbers = number_columns(potential, settings)
        self._indices = [potential.task_index(task) for task in settings.tasks]
        self._has_energy = [potential.facts(task).has_energy for task in settings.tasks]

    def table(self, rows: Rows, found: Found) -> tuple[pa.Table, list[Refused]]:
        """Put a batch into columns, null where a task cannot take a structure; those without finite numbers apart."""
        count = len(rows.index)
        members = found.members[:count].cpu().numpy()[:, self._indices]
        energies = members.mean(axis=2)
        columns: dict[str, pa.Array] = {
            "index": pa.array(rows.index),
            "source_id": pa.array(rows.source_ids, pa.string()),
            "formula": pa.array(rows.formulas, pa.string()),
            "atoms": pa.array(rows.atoms),
            "reason": pa.nulls(count, pa.string()),
        }
        for place, task in enumerate(self.settings.tasks):
            unusable = ~rows.usable[:, place]
            if self._has_energy[place]:
                above = (energies[:, place] - rows.reference[:, place]) / rows.atoms
                columns[f"energy_{task}"] = pa.array(energies[:, place], mask=unusable)
                columns[f"interaction_per_atom_{task}"] = pa.array(above, mask=unusable)
                if self.potential.has_spread:
                    spread = members[:, place].std(axis=1, ddof=1)
                    columns[f"energy_spread_{task}"] = pa.array(spread, mask=unusable)
            if task in found.forces:
                forces = found.forces[task][: int(rows.atoms.sum())].cpu().numpy().astype(np.float32)
                columns |= _force_columns(task, forces, rows.atoms, unusable)
        if self.settings.relax:
            flat = pa.list_(pa.float64())
            columns["positions"] = pa.array([each.positions.reshape(-1) for each in rows.structures], flat)
            columns["cell"] = pa.array([each.cell.reshape(-1) for each in rows.structures], flat)
            columns[REACHED] = pa.array([bool(each.targets[REACHED]) for each in rows.structures])
        table = pa.table([columns[name] for name in self.schema.names], schema=self.schema)
        return self._apart(table, rows)

    def _apart(self, table: pa.Table, rows: Rows) -> tuple[pa.Table, list[Refused]]:
        """Take out the rows with numbers that are not finite."""
        strange = np.zeros(table.num_rows, dtype=bool)
        named: dict[int, str] = {}
        for name in self.numbers:
            column = table[name]
            bad = column.is_valid().to_numpy() & ~np.isfinite(column.fill_null(0.0).to_numpy())
            named |= dict.fromkeys(np.flatnonzero(bad & ~strange).tolist(), name)
            strange |= bad
        refused = [
            rows.refused(place, "not_finite", f"its {name} is no finite number")
            for place, name in sorted(named.items())
        ]
        return (table.filter(pa.array(~strange)) if refused else table), refused

    def refused(self, refused: list[Refused]) -> pa.Table:
        """Rows of structures that were not computed: with a reason and nothing else."""
        rows = [
            {
                "index": each.index,
                "source_id": each.source_id,
                "formula": each.formula or None,
                "atoms": each.atoms or None,
                "reason": each.reason,
            }
            for each in refused
        ]
        return pa.Table.from_pylist(rows, schema=self.schema)


def _force_columns(
    task: str, forces: NDArray[np.float32], atoms: NDArray[np.int32], unusable: NDArray[np.bool_]
) -> dict[str, pa.Array]:
    """Forces [A, 3] as a list of 3 n numbers for each structure, and the longest of each."""
    ends = np.concatenate([[0], np.cumsum(atoms, dtype=np.int64)])
    longest = np.maximum.reduceat(np.linalg.norm(forces, axis=1), ends[:-1])
    offsets = pa.array((3 * ends).astype(np.int32))
    return {
        f"max_force_{task}": pa.array(longest.astype(np.float64), mask=unusable),
        f"forces_{task}": pa.ListArray.from_arrays(offsets, pa.array(forces.reshape(-1)), mask=pa.array(unusable)),
    }
