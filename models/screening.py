"""Screening: energies (and forces) of many structures by many heads, into one parquet file."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ase.symbols import Symbols

from hydrazero.models.potential import Potential
from hydrazero.models.task_facts import NONE
from hydrazero.shards.errors import ConfigError, SourceError, StructureError
from hydrazero.shards.graph import BatchShape, GraphBatch, GraphSample, graph_sample
from hydrazero.shards.structure import Structure, check_structure

SCREEN_SHAPE = BatchShape(structures=128, atoms=2048, slots=32768)


@dataclass(frozen=True, kw_only=True)
class ScreenSettings:
    """What to compute and keep."""

    tasks: tuple[str, ...]
    """Heads; the first one ranks the structures."""
    top: int | None = None
    """Keep only so many structures of lowest energy above the references, per atom, by the first task."""
    forces: bool = False
    """Also compute forces, one more pass for each task."""


@dataclass(frozen=True, kw_only=True)
class ScreenSummary:
    """What a screen did."""

    structures: int
    written: int
    seconds: float


def screen(
    potential: Potential,
    structures: Iterable[Structure],
    out: Path,
    settings: ScreenSettings,
    progress: Callable[[int], None] | None = None,
) -> ScreenSummary:
    """Predict for every structure and write `out`, which appears only when it is complete.

    Columns: index, source_id, formula, atoms; for each task energy_TASK (eV), interaction_per_atom_TASK (eV, the energy
    above the task's references) and, by ensembles, energy_spread_TASK (eV), null where the task has no energies, has
    not seen an element of the structure or lacks its multiplicity; with forces also forces_TASK (eV/Å, flat list of
    3 * atoms). Raises StructureError for a structure that no task can take or that is faulty, SourceError if there is
    none or `out` exists, ModelFileError for an unknown task, ConfigError for a first task that cannot rank.
    """
    first = settings.tasks[0]
    if settings.top is not None and not potential.facts(first).has_energy:
        raise ConfigError(f"task '{first}' has no energies to rank by; name one that has first.")
    for task in settings.tasks:
        potential.task_index(task)
    if out.exists():
        raise SourceError(f"{out} exists; remove it or choose another name.")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    schema, started = _schema(settings, potential.has_spread), time.monotonic()
    count = written = 0
    best: list[tuple[float, int, dict[str, Any]]] = []
    try:
        with pq.ParquetWriter(part, schema) as writer:
            for rows in _screened(potential, structures, settings):
                count += len(rows)
                if settings.top is None:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    written += len(rows)
                else:
                    _keep_best(best, rows, settings)
                if progress is not None:
                    progress(len(rows))
            if settings.top is not None:
                ranked = [row for _, _, row in sorted(best, key=lambda entry: (-entry[0], -entry[1]))]
                writer.write_table(pa.Table.from_pylist(ranked, schema=schema))
                written = len(ranked)
        if count == 0:
            raise SourceError("the sources hold no structure; there is nothing to screen.")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return ScreenSummary(structures=count, written=written, seconds=time.monotonic() - started)


def _schema(settings: ScreenSettings, has_spread: bool) -> pa.Schema:
    columns = [("index", pa.int64()), ("source_id", pa.string()), ("formula", pa.string()), ("atoms", pa.int32())]
    for task in settings.tasks:
        columns += [(f"energy_{task}", pa.float64()), (f"interaction_per_atom_{task}", pa.float64())]
        if has_spread:
            columns.append((f"energy_spread_{task}", pa.float64()))
        if settings.forces:
            columns.append((f"forces_{task}", pa.list_(pa.float32())))
    return pa.schema(columns)


def _keep_best(
    best: list[tuple[float, int, dict[str, Any]]], rows: Sequence[dict[str, Any]], settings: ScreenSettings
) -> None:
    """Keep the rows of lowest energy in a heap whose top is the worst kept."""
    for row in rows:
        value = row[f"interaction_per_atom_{settings.tasks[0]}"]
        if value is None:
            continue
        heapq.heappush(best, (-value, -row["index"], row))
        if len(best) > (settings.top or 0):
            heapq.heappop(best)


def _samples(potential: Potential, structures: Iterable[Structure], settings: ScreenSettings) -> Iterator[GraphSample]:
    for number, given in enumerate(structures):
        structure = replace(given, energy=None, forces=None, stress=None)  # a faulty label does not matter here
        name = structure.source_id or f"structure {number}"
        try:
            check_structure(structure)
            reasons = [potential.why_not(structure, task) for task in settings.tasks]
            if all(reasons):
                raise StructureError("unseen", f"it {reasons[0]}")
            yield graph_sample(structure, 0, potential.cutoff, origin=(number,))
        except StructureError as error:
            raise StructureError(error.reason, f"{name}: {error}; leave it out of the screen.") from error


def _screened(
    potential: Potential, structures: Iterable[Structure], settings: ScreenSettings
) -> Iterator[list[dict[str, Any]]]:
    indices = [potential.task_index(task) for task in settings.tasks]
    for packed, batch in potential.batches(_samples(potential, structures, settings), SCREEN_SHAPE):
        members = potential.member_energies(batch)
        energies = members.mean(2)
        spreads = members.std(2, ddof=1) if potential.has_spread else None
        forces = (
            {task: _forces(potential, batch, index) for task, index in zip(settings.tasks, indices, strict=True)}
            if (settings.forces)
            else {}
        )
        references = {
            index: potential.model.reference_energy(batch, torch.full_like(batch.task, index)).cpu().numpy()
            for index in indices
        }
        first = 0
        rows = []
        for number, sample in enumerate(packed):
            structure, atoms = sample.structure, slice(first, first + len(sample.structure))
            first = atoms.stop
            row: dict[str, Any] = {
                "index": sample.origin[0],
                "source_id": structure.source_id,
                "formula": str(Symbols(structure.numbers).get_chemical_formula()),
                "atoms": len(structure),
            }
            for task, index in zip(settings.tasks, indices, strict=True):
                if potential.why_not(structure, task) is not None:
                    continue
                if potential.facts(task).has_energy:
                    energy = float(energies[number, index])
                    row[f"energy_{task}"] = energy
                    row[f"interaction_per_atom_{task}"] = (energy - float(references[index][number])) / len(structure)
                    if spreads is not None:
                        row[f"energy_spread_{task}"] = float(spreads[number, index])
                if task in forces and potential.facts(task).forces != NONE:
                    row[f"forces_{task}"] = forces[task][atoms].reshape(-1)
            rows.append(row)
        yield rows


def _forces(potential: Potential, batch: GraphBatch, task: int) -> np.ndarray:
    """Forces of a batch by one task's head, eV/Å, [atoms, 3]."""
    batch.task = torch.full_like(batch.task, task)
    return potential.model(batch).forces.detach().cpu().numpy().astype(np.float32)
