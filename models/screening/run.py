"""A screen, from sources to files: one rank's part of it, and the end that the last rank makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydrazero.models.inference.potential import Potential
from hydrazero.models.screening.lookup import Lookup, Refused, Rows
from hydrazero.models.screening.output import Output
from hydrazero.models.screening.parts import PartWriter
from hydrazero.models.screening.predictor import Columns, Found, Predictor
from hydrazero.models.screening.reader import Lane, Screenful, Share, screenfuls, shape_for_screen
from hydrazero.models.screening.relaxed import Relaxer
from hydrazero.models.screening.settings import CHUNK, ScreenSettings, check_settings
from hydrazero.models.screening.sources import Source
from hydrazero.shards.errors import ConfigError, SourceError
from hydrazero.shards.graphs.device_neighbours import find_neighbours, has_device_neighbours
from hydrazero.shards.stream.batch_buffer import BatchBuffer, from_buffer

ATOMS_ON_CPU, ATOMS_ON_GPU = 2048, 32_768
COMPILE_AFTER = 20.0
"""Seconds of work after which compiling, which takes about as long, pays."""


@dataclass(frozen=True, kw_only=True)
class ScreenPlan:
    """How the work is done; the rows do not depend on it, but for rounding."""

    rank: int = 0
    ranks: int = 1
    workers: int = 1
    """Processes of this rank that read; 0 reads in this one."""
    atoms: int | None = None
    """Atoms in a batch; by default what suits the device."""
    compile_after: float = COMPILE_AFTER
    """Seconds of the model's work after which it is compiled."""
    device_neighbours: bool | None = None
    """Whether neighbours are found on the model's device; by default on a GPU where the extra `gpu` is installed."""
    model_id: str = ""
    """What tells the model from others when a screen goes on, its file's checksum for example."""


@dataclass(frozen=True, kw_only=True)
class ScreenSummary:
    """What a rank did, and what all of them together have written if this rank came last."""

    structures: int
    """That this rank has screened this time."""
    seconds: float
    """From begin to end."""
    model_seconds: float
    """Of these, in the model."""
    start_seconds: float
    """Of these, until the first batch was there, and in the compiler."""
    whole: dict[str, Any] | None = None
    """'structures', 'written' and 'refused' (kind -> number) of the whole screen; None while other ranks are at it."""
    was_complete: bool = False
    """Whether the same screen was complete when this rank began."""


def screen(
    potential: Potential,
    sources: Sequence[Source],
    out: Path,
    settings: ScreenSettings,
    plan: ScreenPlan | None = None,
    progress: Callable[[int], None] | None = None,
) -> ScreenSummary:
    """Predict for every structure, by all heads in one pass; what is done already of the same screen is not done again.

    `out` is a file that ends in .parquet, or a folder of such files. Columns: index (place in all sources), source_id,
    formula, atoms; for each task energy_TASK (eV), interaction_per_atom_TASK (eV, the energy above the task's
    references) and, by ensembles, energy_spread_TASK (eV), null where the task has no energies, has not seen an element
    of the structure or lacks its multiplicity; for tasks with forces max_force_TASK (eV/Å) and forces_TASK (eV/Å, flat
    list of 3 * atoms); where they are relaxed positions and cell (Å, flat) and converged; and reason, which says why a
    structure was not computed. Rows of a file are in the order of the sources, with `top` by rank.

    Raises SourceError if there is no structure or `out` is there already, ModelFileError for an unknown task,
    ConfigError for settings that do not fit.
    """
    plan = plan or ScreenPlan()
    started = time.monotonic()
    check_settings(potential, settings)
    if not 0 <= plan.rank < plan.ranks:
        raise ConfigError(f"rank {plan.rank} of {plan.ranks} ranks does not exist.")
    output = Output(out)
    work = _Work(potential, settings, plan, output, progress)
    identities = [source.identity() for source in sources]
    with _said(out):
        record = {"model": plan.model_id, "sources": identities, "settings": settings.record()}
        if not output.begin(record, plan.ranks):
            seconds = time.monotonic() - started
            return ScreenSummary(structures=0, seconds=seconds, model_seconds=0.0, start_seconds=0.0, was_complete=True)
        with output.working(plan.rank, plan.ranks):
            done = frozenset(chunk for found in output.notes().values() for chunk in found)
            total = work.do(sources, Share(rank=plan.rank, ranks=plan.ranks, done=done))
        if [source.identity() for source in sources] != identities:
            raise SourceError(f"the sources have changed meanwhile; remove {output.parts}, and start again.")
        whole = output.finish(total, settings, plan.rank, plan.ranks)
    return ScreenSummary(
        structures=work.structures,
        seconds=time.monotonic() - started,
        model_seconds=work.predictor.seconds,
        start_seconds=work.waited_for_first + work.predictor.compiling,
        whole=whole,
    )


@contextmanager
def _said(out: Path) -> Iterator[None]:
    """Turn what a disk or a killed reader raises into a sentence."""
    again = "the same command goes on where it was"
    try:
        yield
    except OSError as error:
        raise SourceError(f"{out} cannot be written ({error.strerror or error}); {again}.") from error
    except torch.OutOfMemoryError as error:
        raise SourceError(f"a batch exceeds the GPU's memory; with a smaller --batch-atoms {again}.") from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise SourceError(f"a process that reads has ended ({str(error).rstrip('.')}); {again}.") from error


@dataclass(kw_only=True)
class _Batch:
    rows: Rows
    found: Found


class _Work:
    """What one rank does: batches come in, rows go out."""

    def __init__(
        self,
        potential: Potential,
        settings: ScreenSettings,
        plan: ScreenPlan,
        output: Output,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.potential, self.settings, self.plan = potential, settings, plan
        self.predictor = Predictor(potential, settings, plan.compile_after)
        self.columns = Columns(potential, settings)
        self.writer = PartWriter(output.parts, settings, self.columns.schema, by_chunk=output.one_file)
        self.progress = progress or (lambda count: None)
        wanted = plan.device_neighbours
        self._on_device = potential.device.type == "cuda" and has_device_neighbours() if wanted is None else wanted
        self._relaxer: Relaxer | None = None
        if settings.relax:
            self._relaxer = Relaxer(potential, settings.tasks[0], settings.relax, settings.max_atoms)
        self.structures = 0
        self.waited_for_first = 0.0
        self._computing: _Batch | None = None
        self._mine: float = float("inf")

    def do(self, sources: Sequence[Source], share: Share) -> int:
        """Screen this rank's chunks; returns the number of structures in all sources."""
        started = time.monotonic()
        lookup = Lookup(self.potential, self.settings)
        atoms = self.plan.atoms or (ATOMS_ON_GPU if self.potential.device.type == "cuda" else ATOMS_ON_CPU)
        shape = shape_for_screen(sources, lookup, atoms)
        if self._on_device:
            lookup.rows_per_atom = shape.rows / shape.atoms
        self._mine = structures_of(sources, share)
        lane, workers = Lane(sources, lookup, shape, share), self.plan.workers
        if self.settings.relax:  # which is the model's work: in this process
            lane.relaxer, workers = self._relaxer, 0
        totals = set()
        try:
            for news in screenfuls(lane, workers):
                if self.waited_for_first == 0.0:
                    self.waited_for_first = time.monotonic() - started
                if news.fault:
                    raise SourceError(news.fault)
                self._take(news)
                totals |= {news.total} - {None}
            self._collect()
        finally:
            self.writer.write()  # what is whole, also of a screen that is interrupted
        if len(totals) > 1:
            numbers = " and ".join(f"{total:,}" for total in sorted(filter(None, totals)))
            raise SourceError(f"the sources have {numbers} structures for different readers; start again.")
        return totals.pop() or 0

    def _take(self, news: Screenful) -> None:
        """Start a batch, and only then fetch the one before: on a GPU both go on at once."""
        if news.batch is not None and news.rows is not None:
            try:
                found = self._predicted(news.batch, usual=news.usual)
            except torch.OutOfMemoryError:
                if len(news.rows.index) > 1:
                    raise
                found = None
            self._collect()
            if found is None:
                self._refuse([news.rows.refused(0, "out_of_memory", "it does not fit into the GPU's memory")])
            else:
                self._computing = _Batch(rows=news.rows, found=found)
        self._refuse(news.refused)
        self.writer.finished(news.finished)

    def _predicted(self, handed: BatchBuffer, *, usual: bool) -> Found:
        """Bring a batch to the model's device, find its neighbours there if workers have not, and start the model."""
        batch = from_buffer(handed).to(self.potential.device, non_blocking=True)
        if self._on_device:
            usual &= find_neighbours(batch, len(batch.row_atom), self.potential.cutoff)
            del batch.pbc
        return self.predictor(batch, usual=usual)

    def _collect(self) -> None:
        if self._computing is not None:
            rows = self._computing.rows
            table, strange = self.columns.table(rows, self._computing.found)
            self.writer.add(table)
            self._count(table.num_rows)
            self._refuse(strange)
            self._computing = None

    def _refuse(self, refused: list[Refused]) -> None:
        if refused:
            self.writer.add(self.columns.refused(refused), [each.kind for each in refused])
            self._count(len(refused))

    def _count(self, structures: int) -> None:
        self.structures += structures
        self.predictor.left = self._mine / self.structures - 1.0
        self.progress(structures)


def structures_of(sources: Sequence[Source], share: Share) -> float:
    """About how many structures a rank has to screen; infinite if no one can tell without reading."""
    lengths = [source.known_length() for source in sources]
    if None in lengths:
        return float("inf")
    return max(sum(length or 0 for length in lengths) - CHUNK * len(share.done), 0) / share.ranks
