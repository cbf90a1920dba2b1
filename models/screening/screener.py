"""Screening from sources to files: the share of one rank, and the result that the last rank writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydrazero.models.inference.extrapolation import ExtrapolationWarning
from hydrazero.models.inference.own_modes import own_modes
from hydrazero.models.inference.potential import Potential
from hydrazero.models.inference.user_warnings import warn_user
from hydrazero.models.screening.batch_loading import (
    RankShare,
    ScreenDataset,
    WorkerOutput,
    shape_for_screen,
    worker_outputs,
)
from hydrazero.models.screening.checks import check_settings
from hydrazero.models.screening.columns import RowTables
from hydrazero.models.screening.output import ScreenOutput
from hydrazero.models.screening.part_files import PartWriter
from hydrazero.models.screening.predictor import BatchResult, Predictor
from hydrazero.models.screening.relaxation import Relaxer
from hydrazero.models.screening.samples import BatchRows, Rejection, SampleBuilder
from hydrazero.models.screening.settings import CHUNK, ScreenSettings
from hydrazero.models.screening.sources import FileSource, Source
from hydrazero.shards.errors import ConfigError, SourceError
from hydrazero.shards.graphs.device_neighbours import find_neighbours, has_device_neighbours
from hydrazero.shards.stream.batch_buffer import BatchBuffer, from_buffer

ATOMS_ON_CPU, ATOMS_ON_GPU = 2048, 32_768
"""Default numbers of atoms in a batch."""
COMPILE_AFTER = 20.0
"""Seconds of work after which compiling the model, which takes about as long, saves time."""


@dataclass(frozen=True, kw_only=True)
class ScreenPlan:
    """How a screen is computed. The rows do not depend on it, except for rounding errors."""

    rank: int = 0
    ranks: int = 1
    workers: int = 1
    """Number of processes that read for this rank; with 0, the process of the rank reads itself."""
    atoms: int | None = None
    """Number of atoms in a batch; by default a number that suits the device."""
    compile_after: float = COMPILE_AFTER
    """Seconds of the model's work after which it is compiled."""
    device_neighbours: bool | None = None
    """Whether neighbours are found on the model's device. By default they are on a GPU if the extra `gpu` is
    installed."""
    model_id: str = ""
    """Text that identifies the model when a screen is resumed, for example the checksum of its file."""


@dataclass(frozen=True, kw_only=True)
class ScreenSummary:
    """What a rank has computed and, if it was the last one, what all ranks together have written."""

    structures: int
    """Number of structures that this rank has screened in this start."""
    seconds: float
    """Duration of the call."""
    model_seconds: float
    """Seconds of it that were spent in the model."""
    start_seconds: float
    """Seconds of it until the first batch was ready, and in the compiler."""
    totals: dict[str, Any] | None = None
    """'structures', 'written', 'refused' (number of structures by kind) and 'too_close' (number by task) of all ranks
    together; None if other ranks are still working."""
    was_complete: bool = False
    """Whether the same screen was complete when this rank began."""


@own_modes()
def screen(
    potential: Potential,
    sources: Sequence[Source],
    out: Path,
    settings: ScreenSettings,
    plan: ScreenPlan | None = None,
    progress: Callable[[int], None] | None = None,
) -> ScreenSummary:
    """Predict energies and forces of every structure, all energies in one pass; resume the same screen if unfinished.

    `out` is a file that ends in .parquet, or a folder of such files. Its rows are in the order of the sources or, with
    `top`, ordered by rank. `progress` is called with the number of structures after each batch. The columns are:

    - index (number of the structure in all sources), source_id, formula, atoms;
    - for each task energy_TASK (eV), interaction_per_atom_TASK (eV, the energy above the task's reference energies, per
      atom) and, from ensembles, energy_spread_TASK (eV). They are null where the task has no energies, was not trained
      on an element of the structure, or needs a multiplicity that the structure does not state;
    - for tasks with forces max_force_TASK (eV/Å) and forces_TASK (eV/Å, a flat list of 3 * atoms numbers);
    - for relaxed structures positions and cell (Å, flat lists) and converged;
    - too_close_TASK, whether two atoms are closer than any two of their elements in the task's training data; only for
      tasks of which these distances are known;
    - reason, which says why a structure was not computed.

    Raises SourceError if the sources hold no structure or `out` exists already, ModelFileError for an unknown task, and
    ConfigError for settings that the model cannot fulfil.
    """
    plan = plan or ScreenPlan()
    started = time.monotonic()
    check_settings(potential, settings)
    if not 0 <= plan.rank < plan.ranks:
        raise ConfigError(f"rank {plan.rank} of {plan.ranks} ranks does not exist.")
    output = ScreenOutput(out)
    screener = _Screener(potential, settings, plan, output, progress)
    for source in sources:
        if isinstance(source, FileSource):
            source.conditions_matter = any(potential.facts(task).charge_spin for task in settings.tasks)
    identities = [source.identity() for source in sources]
    with _clear_errors(out):
        record = {"model": plan.model_id, "sources": identities, "settings": settings.record()}
        if not output.begin(record, plan.ranks):
            seconds = time.monotonic() - started
            return ScreenSummary(structures=0, seconds=seconds, model_seconds=0.0, start_seconds=0.0, was_complete=True)
        with output.working(plan.rank, plan.ranks):
            output.check_parts(plan.rank, plan.ranks)
            done = frozenset(chunk for part in output.part_records().values() for chunk in part)
            total = screener.screen(sources, RankShare(rank=plan.rank, ranks=plan.ranks, done=done))
        if [source.identity() for source in sources] != identities:
            raise SourceError(
                f"the sources have changed while they were screened; remove {output.parts}, and start again."
            )
        totals = output.finish(total, settings, screener.tables.schema, plan.rank, plan.ranks)
    return ScreenSummary(
        structures=screener.structures,
        seconds=time.monotonic() - started,
        model_seconds=screener.predictor.seconds,
        start_seconds=screener.waited_for_first + screener.predictor.compiling,
        totals=totals,
    )


@contextmanager
def _clear_errors(out: Path) -> Iterator[None]:
    """Raise SourceError, as one sentence, for errors of a disk, a GPU's memory or a killed worker."""
    again = "the same command resumes the screen"
    try:
        yield
    except OSError as error:
        raise SourceError(f"{out} cannot be written ({error.strerror or error}); {again}.") from error
    except torch.OutOfMemoryError as error:
        raise SourceError(f"a batch exceeds the GPU's memory; with a smaller --batch-atoms, {again}.") from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise SourceError(f"a data-loading process has ended ({str(error).rstrip('.')}); {again}.") from error


@dataclass(kw_only=True)
class _PendingBatch:
    """A batch that the model computes, and whose rows are not written yet."""

    rows: BatchRows
    result: BatchResult


class _Screener:
    """Screen the share of one rank: batches from its workers become rows of its parts."""

    def __init__(
        self,
        potential: Potential,
        settings: ScreenSettings,
        plan: ScreenPlan,
        output: ScreenOutput,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.potential, self.settings, self.plan = potential, settings, plan
        self.predictor = Predictor(potential, settings, plan.compile_after)
        self.tables = RowTables(potential, settings)
        self.writer = PartWriter(output.parts, settings, self.tables.schema, by_chunk=output.one_file)
        self.progress = progress or (lambda count: None)
        self._on_device = plan.device_neighbours
        if self._on_device is None:
            self._on_device = potential.device.type == "cuda" and has_device_neighbours()
        self._relaxer: Relaxer | None = None
        if settings.relax:
            self._relaxer = Relaxer(potential, settings.tasks, settings.relax, settings.max_atoms)
        self.structures = 0
        self.waited_for_first = 0.0
        self._pending: _PendingBatch | None = None
        self._builder = SampleBuilder(potential, settings)
        self._said_close = False
        self._expected: float = float("inf")

    def screen(self, sources: Sequence[Source], share: RankShare) -> int:
        """Screen this rank's chunks; return the number of structures in all sources."""
        started = time.monotonic()
        builder = self._builder
        atoms = self.plan.atoms or (ATOMS_ON_GPU if self.potential.device.type == "cuda" else ATOMS_ON_CPU)
        shape = shape_for_screen(sources, builder, atoms)
        if self._on_device:
            builder.rows_per_atom = shape.rows / shape.atoms
        self._expected = expected_structures(sources, share)
        dataset, workers = ScreenDataset(sources, builder, shape, share), self.plan.workers
        if self.settings.relax:  # relaxation runs the model, which only this process holds
            dataset.relaxer, workers = self._relaxer, 0
        totals = set()
        try:
            for output in worker_outputs(dataset, workers):
                if self.waited_for_first == 0.0:
                    self.waited_for_first = time.monotonic() - started
                if output.error:
                    raise SourceError(output.error)
                self._take(output)
                totals |= {output.total} - {None}
            self._write_pending()
        finally:
            self.writer.write()  # complete chunks of an interrupted screen are kept too
        if len(totals) > 1:
            numbers = " and ".join(f"{total:,}" for total in sorted(filter(None, totals)))
            raise SourceError(f"workers have read different numbers of structures ({numbers}); start again.")
        return totals.pop() or 0

    def _take(self, output: WorkerOutput) -> None:
        """Start a batch, and only then write the previous one, so that a GPU computes while rows are written."""
        if output.batch is not None and output.rows is not None:
            try:
                result = self._predict(output.batch, output.rows, usual=output.usual)
            except torch.OutOfMemoryError:
                if len(output.rows.index) > 1:
                    raise
                result = None
            self._write_pending()
            if result is None:
                reason = "it does not fit into the GPU's memory"
                self._write_rejected([output.rows.rejection(0, "out_of_memory", reason)])
            else:
                self._pending = _PendingBatch(rows=output.rows, result=result)
        self._write_rejected(output.rejected)
        self.writer.expect(output.chunk_sizes)

    def _predict(self, buffer: BatchBuffer, rows: BatchRows, *, usual: bool) -> BatchResult:
        """Copy a batch to the model's device, find its neighbours there if workers have not, and start the model."""
        batch = from_buffer(buffer).to(self.potential.device, non_blocking=True)
        if self._on_device:
            usual &= find_neighbours(batch, len(batch.row_atom), self.potential.cutoff)
            rows.short.extend(self._builder.short_distances.of_batch(batch))
            del batch.pbc
        return self.predictor(batch, usual=usual)

    def _write_pending(self) -> None:
        if self._pending is not None:
            self._warn_of_short_distances(self._pending.rows)
            table, rejections = self.tables.table(self._pending.rows, self._pending.result)
            self.writer.add(table)
            self._count(table.num_rows)
            self._write_rejected(rejections)
            self._pending = None

    def _warn_of_short_distances(self, rows: BatchRows) -> None:
        """Warn of the first structure with atoms closer than in the training data of a task that supports it."""
        for pair in [] if self._said_close else rows.short:
            if rows.supported[pair.structure, pair.task]:
                self._said_close = True
                text = pair.text(self._builder.short_distances.tasks[pair.task], rows.source_ids[pair.structure])
                warn_user(f"{text}; further structures are not named.", ExtrapolationWarning)
                return

    def _write_rejected(self, rejections: list[Rejection]) -> None:
        if rejections:
            self.writer.add(self.tables.rejected(rejections), [each.kind for each in rejections])
            self._count(len(rejections))

    def _count(self, structures: int) -> None:
        self.structures += structures
        self.predictor.left = self._expected / self.structures - 1.0
        self.progress(structures)


def expected_structures(sources: Sequence[Source], share: RankShare) -> float:
    """Return the approximate number of structures that a rank has to screen, infinity if it is not known."""
    lengths = [source.known_length() for source in sources]
    if None in lengths:
        return float("inf")
    return max(sum(length or 0 for length in lengths) - CHUNK * len(share.done), 0) / share.ranks
