"""The model at work in a screen: eager at first, and compiled once enough work remains."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from hydrazero.models.atomistic import AtomisticModel
from hydrazero.models.inference.potential import Potential
from hydrazero.models.inference.user_warnings import warn_user
from hydrazero.models.ops.compiled import CompilationError, CompiledModel, sharing_weights, use_kernels
from hydrazero.models.screening.settings import ScreenSettings
from hydrazero.shards.graphs.graph import GraphBatch


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """Results of the model for a batch of S structures and A atoms, still on the model's device."""

    members: Tensor
    """Energies of every head of the model and every member of its ensemble, eV, [S, heads, members] float64."""
    forces: dict[str, Tensor]
    """Forces by task, eV/Å, [A, 3]."""
    atoms: Tensor
    """Number of atoms of each structure, [S]."""


class Predictor:
    """Compute batches, and measure how long the model takes."""

    def __init__(self, potential: Potential, settings: ScreenSettings, compile_after: float) -> None:
        """Compile the model once it has worked for `compile_after` seconds, if at least as much work is left."""
        self.potential, self.settings, self.compile_after = potential, settings, compile_after
        self.left = float("inf")
        """Remaining work divided by the work done so far; infinite while the total is not known."""
        self._force_tasks = [(task, potential.task_index(task)) for task in settings.forces]
        self._compiled: CompiledModel | None = None
        self._eager = potential.model
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0
        self.compiling = 0.0
        """Seconds spent in the compiler."""

    @property
    def seconds(self) -> float:
        """Seconds spent in the model alone, without reading, copies and compilation."""
        self._collect_timings()
        return self._seconds

    def _collect_timings(self) -> None:
        """Add the time of all batches that the GPU has finished, without waiting for others."""
        while self._events and self._events[0][1].query():
            first, last = self._events.popleft()
            self._seconds += first.elapsed_time(last) / 1e3

    def __call__(self, batch: GraphBatch, *, usual: bool) -> BatchResult:
        """Compute a batch that is on the model's device; only batches of the usual shape use the compiled model."""
        model = self._model(batch) if usual else self._eager
        on_gpu = self.potential.device.type == "cuda"
        if on_gpu:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
        started = time.perf_counter()
        result = self._compute(model, batch)
        if on_gpu:
            last.record()
            self._events.append((first, last))
            self._collect_timings()  # otherwise two events per batch would accumulate
        else:
            self._seconds += time.perf_counter() - started
        return result

    def _compute(self, model: CompiledModel | AtomisticModel, batch: GraphBatch) -> BatchResult:
        forces: dict[str, Tensor] = {}
        members: Tensor | None = None
        for task, index in self._force_tasks:
            batch.task = torch.full_like(batch.task, index)
            members, forces[task] = model.members_and_forces(batch)
        if members is None:
            members = model.members_of_all_tasks(batch)
        return BatchResult(members=members, forces=forces, atoms=batch.n_atoms)

    def _model(self, batch: GraphBatch) -> CompiledModel | AtomisticModel:
        """Return the compiled model if there is one or if it is time to compile, otherwise the eager one."""
        if self._compiled is not None:
            return self._compiled
        if self.seconds < self.compile_after or self.seconds * self.left < self.compile_after:
            return self._eager
        started = time.perf_counter()
        # The kernels are switched on in a copy, since others may use the potential too.
        model = sharing_weights(self.potential.model)
        try:
            if reason := use_kernels(model):
                raise CompilationError(reason)
            compiled = CompiledModel(model)
            self._compute(compiled, batch)
            self._compiled, self._eager = compiled, model
        except CompilationError as error:
            warn_user(f"the model cannot be compiled here and stays slower: {error}")
            self.compile_after = float("inf")
            return self._eager
        finally:
            self.compiling += time.perf_counter() - started
        return self._compiled
