"""Statistics of labels in a manifest: ranges, distributions and outliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.convert.references import reference_table
from hydrazero.shards.convert.splits import is_isolated_atom
from hydrazero.shards.convert.task_statistics import (
    FORCE_EDGES,
    LabelSums,
    Statistics,
    compositions,
    histogram_of,
    strongest,
)
from hydrazero.shards.convert.writer import read_blocks
from hydrazero.shards.manifest_parts import Histogram, LabelRange, Outlier, Shard
from hydrazero.shards.targets import TargetStatistics

LABELS = ("energy_per_atom", "energy_residual_per_atom", "forces", "stress")
"""Labels in the order of the manifest."""


@dataclass(frozen=True, kw_only=True)
class LabelStatistics:
    """Statistics of the labels of a task; see the fields of the same names in `Manifest`."""

    labels: dict[str, LabelRange]
    bound_residual_rms: float | None
    distributions: dict[str, Histogram]
    outliers: dict[str, list[Outlier]]


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """Energies of one shard minus the reference energies of the atoms."""

    per_atom: NDArray[np.float64]
    """eV/atom, [structures]; NaN where there is no energy or an element has no reference energy."""
    moments: LabelSums
    bound: LabelSums
    """Sums over the structures that are no isolated atoms."""
    names: list[str]


def residuals_of(folder: Path, shard: Shard, references: dict[str, float], cutoffs: Sequence[float]) -> Residuals:
    """Return the energies per atom of a shard minus the reference energies.

    `references` are in eV by element; a single atom without a neighbour within `cutoffs` (Å) is an isolated one.
    """
    table = reference_table(references)
    parts, names, lone = [], [], []
    for block in read_blocks(folder / shard.file, shard):
        counts = compositions(block)
        # 0 times NaN would spoil the sums of structures that do not hold the element.
        sums = np.where(counts > 0, counts * table, 0.0).sum(axis=1)
        parts.append((block.energy - sums) / block.n_atoms)
        names += block.names
        lone += [
            size == 1 and is_isolated_atom(block.structure(row), cutoffs) for row, size in enumerate(block.n_atoms)
        ]
    per_atom = np.concatenate(parts)
    moments, bound = LabelSums(), LabelSums()
    moments.add(per_atom)
    bound.add(per_atom[~np.array(lone, dtype=bool)])
    return Residuals(per_atom=per_atom, moments=moments, bound=bound, names=names)


def energy_outliers(residuals: Residuals, mean: float) -> list[Outlier]:
    """Return the structures whose residual is farthest from `mean` (eV/atom), with the difference in eV/atom."""
    away = np.nan_to_num(np.abs(residuals.per_atom - mean), nan=-1.0)
    chosen = np.argsort(-away, kind="stable")[:10]
    return strongest(
        Outlier(source_id=residuals.names[i], value=float(residuals.per_atom[i] - mean)) for i in chosen if away[i] >= 0
    )


def label_statistics(total: Statistics, residuals: Sequence[Residuals], training: int) -> LabelStatistics:
    """Return the statistics of all shards; the first `training` of the residuals are those of the training split.

    `residuals` is empty for a task without energies.
    """
    labels = {name: moments.label_range() for name, moments in total.moments.items() if moments.count}
    distributions, outliers = {}, {"force_norm": total.strongest}
    moments, bound = LabelSums(), LabelSums()
    if residuals:
        for part in residuals[:training]:
            moments.merge(part.moments)
            bound.merge(part.bound)
        mean = moments.total / moments.count
        labels["energy_residual_per_atom"] = moments.label_range()
        per_atom = (part.per_atom for part in residuals[:training])
        distributions["energy_residual_per_atom"] = histogram_of(per_atom, moments)
        found = (entry for part in residuals for entry in energy_outliers(part, mean))
        outliers["energy_residual_per_atom"] = strongest(found)
    if total.forces.any():
        distributions["force_norm"] = Histogram(edges=FORCE_EDGES.tolist(), counts=total.forces.tolist())
    if total.most_stressed:
        outliers["stress"] = total.most_stressed
    return LabelStatistics(
        labels={name: labels[name] for name in LABELS if name in labels},
        bound_residual_rms=bound.label_range().rms if bound.count else None,
        distributions=distributions,
        outliers=dict(sorted(outliers.items())),
    )


def target_statistics(moments: LabelSums, *, of: str, kind: str, unit: str, extensive: bool) -> TargetStatistics:
    """Return the statistics of a target from the sums over its values."""
    # A mean of vectors would depend on the orientation of the structures.
    mean = 0.0 if kind == "vector" else moments.total / moments.count
    return TargetStatistics(
        of=of,
        kind=kind,
        unit=unit,
        extensive=extensive,
        count=moments.count,
        minimum=moments.minimum,
        maximum=moments.maximum,
        mean=mean,
        deviation=float(np.sqrt(max(moments.squares / moments.count - mean**2, 0.0))),
    )
