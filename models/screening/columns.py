"""Columns of a screen's rows: their names and types, and tables of them made from the model's results."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydrazero.models.inference.potential import Potential
from hydrazero.models.inference.short_distances import knows_distances
from hydrazero.models.screening.predictor import BatchResult
from hydrazero.models.screening.samples import BatchRows, Rejection
from hydrazero.models.screening.settings import CONVERGED, TOO_CLOSE, ScreenSettings
from hydrazero.shards.errors import ConfigError


def number_columns(potential: Potential, settings: ScreenSettings) -> list[str]:
    """Return the names of the columns of numbers that the heads give for a structure, in eV or eV/Å."""
    names = []
    for task in settings.tasks:
        if potential.facts(task).has_energy:
            names += [f"energy_{task}", f"interaction_per_atom_{task}"]
            names += [f"energy_spread_{task}"] if potential.has_spread else []
    return names + [f"max_force_{task}" for task in settings.forces]


def schema_of(potential: Potential, settings: ScreenSettings) -> pa.Schema:
    """Return the names and types of all columns of a screen; raise ConfigError if two would have one name."""
    columns = [("index", pa.int64()), ("source_id", pa.string()), ("formula", pa.string()), ("atoms", pa.int32())]
    columns += [(name, pa.float64()) for name in number_columns(potential, settings)]
    columns += [(f"forces_{task}", pa.list_(pa.float32())) for task in settings.forces]
    if settings.relax:
        columns += [("positions", pa.list_(pa.float64())), ("cell", pa.list_(pa.float64())), (CONVERGED, pa.bool_())]
    columns += [(f"{TOO_CLOSE}{task}", pa.bool_()) for task in settings.tasks if knows_distances(potential.facts(task))]
    columns.append(("reason", pa.string()))
    names = [name for name, _ in columns]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"the tasks {', '.join(settings.tasks)} have two columns '{name}'; screen them one after the other."
            )
    return pa.schema(columns)


def ranking_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that a ranking expression may contain; true and false count as 1 and 0."""
    return [field.name for field in schema if field.type in (pa.float64(), pa.bool_())] + ["atoms"]


def with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns of a schema; those that it lacks, as it is of an earlier version, are null."""
    lacking = {
        field.name: pa.nulls(table.num_rows, field.type) for field in schema if field.name not in table.column_names
    }
    return pa.table([lacking[name] if name in lacking else table[name] for name in schema.names], schema=schema)


class RowTables:
    """Make the tables of a screen's rows, batch by batch."""

    def __init__(self, potential: Potential, settings: ScreenSettings) -> None:
        self.potential, self.settings = potential, settings
        self.schema = schema_of(potential, settings)
        self.numbers = number_columns(potential, settings)
        self._indices = [potential.task_index(task) for task in settings.tasks]
        self._has_energy = [potential.facts(task).has_energy for task in settings.tasks]

    def table(self, rows: BatchRows, result: BatchResult) -> tuple[pa.Table, list[Rejection]]:
        """Return the rows of a batch with finite numbers as a table, and the structures whose numbers are not finite.

        Numbers are null where a task does not support a structure.
        """
        count = len(rows.index)
        members = result.members[:count].cpu().numpy()[:, self._indices]
        energies = members.mean(axis=2)
        columns: dict[str, pa.Array] = {
            "index": pa.array(rows.index),
            "source_id": pa.array(rows.source_ids, pa.string()),
            "formula": pa.array(rows.formulas, pa.string()),
            "atoms": pa.array(rows.atoms),
            "reason": pa.nulls(count, pa.string()),
        }
        close = np.zeros((count, len(self.settings.tasks)), dtype=bool)
        close[[pair.structure for pair in rows.short], [pair.task for pair in rows.short]] = True
        for place, task in enumerate(self.settings.tasks):
            unsupported = ~rows.supported[:, place]
            if self._has_energy[place]:
                above = (energies[:, place] - rows.reference[:, place]) / rows.atoms
                columns[f"energy_{task}"] = pa.array(energies[:, place], mask=unsupported)
                columns[f"interaction_per_atom_{task}"] = pa.array(above, mask=unsupported)
                if self.potential.has_spread:
                    spread = members[:, place].std(axis=1, ddof=1)
                    columns[f"energy_spread_{task}"] = pa.array(spread, mask=unsupported)
            if task in result.forces:
                forces = result.forces[task][: int(rows.atoms.sum())].cpu().numpy().astype(np.float32)
                columns |= _force_columns(task, forces, rows.atoms, unsupported)
            columns[f"{TOO_CLOSE}{task}"] = pa.array(close[:, place], mask=unsupported)
        if self.settings.relax:
            flat = pa.list_(pa.float64())
            columns["positions"] = pa.array([each.positions.reshape(-1) for each in rows.structures], flat)
            columns["cell"] = pa.array([each.cell.reshape(-1) for each in rows.structures], flat)
            columns[CONVERGED] = pa.array([bool(each.targets[CONVERGED]) for each in rows.structures])
        table = pa.table([columns[name] for name in self.schema.names], schema=self.schema)
        return self._split_non_finite(table, rows)

    def _split_non_finite(self, table: pa.Table, rows: BatchRows) -> tuple[pa.Table, list[Rejection]]:
        """Return the rows whose numbers are all finite, and a rejection for each of the others."""
        non_finite = np.zeros(table.num_rows, dtype=bool)
        first_column: dict[int, str] = {}
        for name in self.numbers:
            column = table[name]
            bad = column.is_valid().to_numpy() & ~np.isfinite(column.fill_null(0.0).to_numpy())
            first_column |= dict.fromkeys(np.flatnonzero(bad & ~non_finite).tolist(), name)
            non_finite |= bad
        rejections = [
            rows.rejection(place, "not_finite", f"its {name} is not a finite number")
            for place, name in sorted(first_column.items())
        ]
        return (table.filter(pa.array(~non_finite)) if rejections else table), rejections

    def rejected(self, rejections: list[Rejection]) -> pa.Table:
        """Return the rows of structures that were not computed: they hold a reason and no numbers."""
        rows = [
            {
                "index": each.index,
                "source_id": each.source_id,
                "formula": each.formula or None,
                "atoms": each.atoms or None,
                "reason": each.reason,
            }
            for each in rejections
        ]
        return pa.Table.from_pylist(rows, schema=self.schema)


def _force_columns(
    task: str, forces: NDArray[np.float32], atoms: NDArray[np.int32], unsupported: NDArray[np.bool_]
) -> dict[str, pa.Array]:
    """Return forces [A, 3] as one list of 3 n numbers per structure of n atoms, and the longest force of each.

    `atoms` [S] are the numbers of atoms, and `unsupported` [S] marks structures that get nulls.
    """
    ends = np.concatenate([[0], np.cumsum(atoms, dtype=np.int64)])
    longest = np.maximum.reduceat(np.linalg.norm(forces, axis=1), ends[:-1])
    offsets = pa.array((3 * ends).astype(np.int32))
    return {
        f"max_force_{task}": pa.array(longest.astype(np.float64), mask=unsupported),
        f"forces_{task}": pa.ListArray.from_arrays(offsets, pa.array(forces.reshape(-1)), mask=pa.array(unsupported)),
    }
