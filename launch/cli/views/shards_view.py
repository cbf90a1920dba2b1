"""What a manifest says, as tables for a terminal and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ase.data import atomic_numbers, chemical_symbols
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hydrazero.launch.cli.views.periodic_table import COLUMNS, ROWS, place_of
from hydrazero.launch.cli.views.target_table import targets_table
from hydrazero.launch.cli.views.task_notes import task_notes
from hydrazero.shards.manifest import SPLITS, Manifest
from hydrazero.shards.manifest_parts import Degrees
from hydrazero.shards.text.terminal import plain

HISTOGRAM_BINS = 12
BAR_WIDTH = 40
SHOWN_OUTLIERS = 5
OUTLIER_UNITS = {
    "energy_residual_per_atom": "eV/atom, deviation of energy - references",
    "force_norm": "eV/Å, largest force",
    "stress": "eV/Å³, largest component of the stress",
}
LABEL_HEADINGS = {
    "energy_per_atom": "energy",
    "energy_residual_per_atom": "energy - references",
    "forces": "forces",
    "stress": "stress",
}
LABEL_UNITS = {
    "energy_per_atom": "eV/atom",
    "energy_residual_per_atom": "eV/atom",
    "forces": "eV/Å",
    "stress": "eV/Å³",
}


def manifest_facts(manifest: Manifest) -> dict[str, Any]:
    """Return the contents of a manifest, without its lists of blocks, in a form that JSON can hold."""
    splits = {
        split: {
            "structures": manifest.structures(split),
            "atoms": manifest.atoms(split),
            "shards": len(manifest.splits.get(split, [])),
            "bytes": sum(shard.bytes for shard in manifest.splits.get(split, [])),
        }
        for split in SPLITS
    }
    return {
        "task": manifest.task,
        "structures": manifest.structures(),
        "atoms": manifest.atoms(),
        "splits": splits,
        "elements": manifest.elements,
        "trained_elements": manifest.trained_elements,
        "size_histogram": {str(size): count for size, count in manifest.size_histogram.items()},
        "periodic_structures": manifest.periodic_structures,
        "labels": {name: vars(label) for name, label in manifest.labels.items()},
        "bound_residual_rms": manifest.bound_residual_rms,
        "targets": {name: vars(facts) for name, facts in manifest.targets.items()},
        "required_labels": manifest.required_labels,
        "reference_energies": manifest.reference_energies,
        "references": manifest.references,
        "isolated_atoms": manifest.isolated_atoms,
        "undetermined_sums": manifest.undetermined_sums,
        "warnings": manifest.warnings,
        "charged_structures": manifest.charged_structures,
        "degrees": {cutoff: _degree_facts(degrees) for cutoff, degrees in manifest.degrees.items()},
        "distributions": {name: vars(histogram) for name, histogram in manifest.distributions.items()},
        "outliers": {name: [vars(one) for one in found] for name, found in manifest.outliers.items()},
        "duplicate_count": manifest.duplicate_count,
        "duplicates": manifest.duplicates,
        "set_aside": manifest.set_aside,
        "source": manifest.source,
        "units": manifest.units,
        "float_dtype": manifest.float_dtype,
    }


def _degree_facts(degrees: Degrees) -> dict[str, Any]:
    atoms = sum(degrees.histogram.values())
    return {
        "mean": degrees.edges / atoms if atoms else 0.0,
        "most": max(degrees.histogram, default=0),
        "most_edges": degrees.most_edges,
        "most_edges_in": degrees.most_edges_in,
        "most_slots": degrees.most_slots,
        "most_slots_in": degrees.most_slots_in,
        "histogram": {str(degree): count for degree, count in sorted(degrees.histogram.items())},
    }


SIDE_BY_SIDE = (
    "task",
    "train",
    "val",
    "test",
    "atoms each",
    "elements",
    "periodic",
    "charged",
    "energy",
    "forces",
    "neighbours",
    "duplicates",
    "skipped",
)
"""Columns of the table that compares several tasks."""


def side_by_side_rows(manifests: Sequence[Manifest], cutoff: str) -> list[list[str]]:
    """Return a row of texts for each task, in the columns SIDE_BY_SIDE."""
    rows, bound = [], all_bound(manifests)
    for manifest in manifests:
        sizes = sorted(manifest.size_histogram)
        symbols = sorted(manifest.elements, key=lambda symbol: atomic_numbers[symbol])
        labels, degrees = manifest.labels, manifest.degrees.get(cutoff)
        facts = None if degrees is None else _degree_facts(degrees)
        forces, energy = labels.get("forces"), labels.get("energy_residual_per_atom")
        rows.append(
            [
                manifest.task,
                *(f"{manifest.structures(split):,}" for split in SPLITS),
                str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}",
                " ".join(symbols) if len(symbols) <= 5 else f"{len(symbols)}: {symbols[0]} to {symbols[-1]}",
                f"{100 * manifest.periodic_structures / manifest.structures():.0f}%",
                f"{100 * manifest.charged_structures / manifest.structures():.0f}%",
                "-" if energy is None else f"{1000 * _residual_rms(manifest, bound):,.0f}",
                "-" if forces is None else f"{forces.rms:.2f}",
                "-" if facts is None else f"{facts['mean']:.0f}, {facts['most']}",
                f"{manifest.duplicate_count:,}",
                f"{sum(manifest.set_aside.values()):,}",
            ]
        )
    return rows


def all_bound(manifests: Sequence[Manifest]) -> bool:
    """Return whether all tasks with energies know the deviation from the references without isolated atoms."""
    known = [each.bound_residual_rms is not None for each in manifests if "energy_residual_per_atom" in each.labels]
    return all(known)


def _residual_rms(manifest: Manifest, bound: bool) -> float:
    """Return the root mean square of the energy minus reference energies, without isolated atoms if `bound`."""
    rms = manifest.bound_residual_rms if bound else None
    return manifest.labels["energy_residual_per_atom"].rms if rms is None else rms


def describe_several(manifests: Sequence[Manifest], cutoff: str) -> RenderableType:
    """Return tables that compare tasks and the elements of all of them, for a terminal."""
    total = sum(manifest.structures() for manifest in manifests)
    rows = side_by_side_rows(manifests, cutoff)
    # Two tables, because one with all columns would be wider than 80 characters.
    tables = []
    for title, columns in (("structures", range(1, 8)), ("labels, neighbours", range(8, len(SIDE_BY_SIDE)))):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in (0, *columns):
            table.add_column(SIDE_BY_SIDE[column], justify="left" if column in (0, 5) else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[column] for column in (0, *columns)))
        tables.append(table)
    head = Text(f"{len(manifests)} tasks, {total:,} structures", style="bold")
    has_atoms = any(manifest.isolated_atoms for manifest in manifests)
    without = f" ({'without' if all_bound(manifests) else 'with'} isolated atoms)" if has_atoms else ""
    note = (
        f"energy: root mean square of the energy minus reference energies{without}, meV/atom; forces: root mean "
        f"square, eV/Å; neighbours: mean and maximum of an atom within {cutoff} Å"
    )
    notes = [f"{manifest.task}: {text}" for manifest in manifests for text in task_notes(manifest)]
    return Group(
        head, *tables, Text(note), Text(""), element_map(manifests), *([plain("\n".join(notes))] if notes else [])
    )


HEAT = ("#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#084594")
"""Colours for the number of atoms, from few to many, on a logarithmic scale."""


def element_map(manifests: Sequence[Manifest]) -> Text:
    """Return the periodic table, coloured by the number of atoms of each element in the tasks."""
    counts: Counter[str] = Counter()
    for manifest in manifests:
        counts.update(manifest.elements)
    most = math.log10(max(counts.values()))
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    for number in range(1, 119):
        symbol = chemical_symbols[number]
        count = counts.get(symbol, 0)
        shade = HEAT[min(int(len(HEAT) * math.log10(count) / most), len(HEAT) - 1)] if count and most else HEAT[-1]
        ink = "white" if shade in HEAT[3:] else "black"
        cells[place_of(number)] = (symbol, f"{ink} on {shade}" if count else "dim")
    text = Text()
    for row in range(ROWS):
        if row == 7:
            text.append("\n")
        for column in range(COLUMNS):
            symbol, style = cells.get((row, column), ("", ""))
            text.append(f"{symbol:^3}", style=style)
            text.append(" ")
        text.append("\n")
    text.append(f"number of atoms: from 1 (light) to {max(counts.values()):,} (dark); grey: none")
    return text


def size_bins(histogram: dict[int, int]) -> list[tuple[str, int]]:
    """Return (label, structures) of at most HISTOGRAM_BINS bins of equal width for a histogram of sizes."""
    smallest, largest = min(histogram), max(histogram)
    width = -(-(largest - smallest + 1) // HISTOGRAM_BINS)
    bins = []
    for first in range(smallest, largest + 1, width):
        last = first + width - 1
        count = sum(number for size, number in histogram.items() if first <= size <= last)
        bins.append((str(first) if width == 1 else f"{first}-{last}", count))
    return bins


def describe(manifest: Manifest) -> RenderableType:
    """Return tables of counts, elements, sizes and labels for a terminal."""
    parts: list[RenderableType] = [plain(f"task {manifest.task}: {manifest.structures():,} structures", style="bold")]
    parts += [_splits_table(manifest), _elements_table(manifest), element_map([manifest]), _sizes_table(manifest)]
    parts.append(_labels_table(manifest))
    if manifest.targets:
        parts.append(targets_table(manifest))
    parts += [_degrees_table(manifest), _outliers_table(manifest)]
    facts = [f"{key}: {value}" for key, value in manifest.source.items()]
    periodic = f"{manifest.periodic_structures:,} of {manifest.structures():,} structures are periodic"
    notes = [periodic, f"positions, forces and stress are {manifest.float_dtype}, energies float64"]
    if manifest.isolated_atoms and manifest.bound_residual_rms is not None:
        notes.append(
            "energy - references has a root mean square of "
            f"{1000 * manifest.bound_residual_rms:.3g} meV/atom without isolated atoms"
        )
    if manifest.duplicate_count:
        notes.append(
            f"{manifest.duplicate_count:,} structures repeat an earlier geometry; the first is {manifest.duplicates[0]}"
        )
    notes += [f"skipped, {reason}: {count:,}" for reason, count in manifest.set_aside.items()]
    notes += task_notes(manifest)
    parts.append(plain("\n".join(facts + notes)))
    return Group(*parts)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _splits_table(manifest: Manifest) -> Table:
    table = _table("splits", "split", "structures", "atoms", "shards", "MB")
    for split, row in manifest_facts(manifest)["splits"].items():
        megabytes = f"{row['bytes'] / 1e6:.2f}"
        table.add_row(split, f"{row['structures']:,}", f"{row['atoms']:,}", str(row["shards"]), megabytes)
    return table


def _elements_table(manifest: Manifest) -> Table:
    columns = [manifest.reference_energies, *[manifest.isolated_atoms] * bool(manifest.isolated_atoms)]
    headings = ("reference energy eV", "isolated atom eV")[: len(columns)]
    table = _table("elements", "element", "atoms", *headings)
    undetermined = {symbol for combination in manifest.undetermined_sums for symbol in combination}
    if manifest.references == "isolated":
        undetermined = set()
    for symbol, count in manifest.elements.items():
        cells = [f"{own[symbol]:.4f}" if symbol in own else "-" for own in columns]
        if symbol in undetermined:
            cells[0] += " (not determined)"
        table.add_row(symbol, f"{count:,}", *cells)
    return table


def _sizes_table(manifest: Manifest) -> Table:
    bins = size_bins(manifest.size_histogram)
    most = max(count for _, count in bins)
    table = Table(title="sizes", title_justify="left")
    table.add_column("atoms")
    table.add_column("structures", justify="right")
    table.add_column("")
    for label, count in bins:
        table.add_row(label, f"{count:,}", "█" * round(BAR_WIDTH * count / most))
    return table


def _labels_table(manifest: Manifest) -> Table:
    # One column per label, because with one row per label the table would be wider than 80 characters.
    table = _table("labels (training split)", "", *(LABEL_HEADINGS[name] for name in manifest.labels))
    labels = list(manifest.labels.values())
    table.add_row("unit", *(LABEL_UNITS[name] for name in manifest.labels))
    table.add_row("values", *(f"{label.count:,}" for label in labels))
    for heading, key in (("minimum", "minimum"), ("maximum", "maximum"), ("mean", "mean"), ("rms", "rms")):
        table.add_row(heading, *(f"{getattr(label, key):.6g}" for label in labels))
    return table


def _degrees_table(manifest: Manifest) -> Table:
    table = _table(
        "neighbours",
        "cutoff\nÅ",
        "mean\nper atom",
        "maximum\nper atom",
        "max. edges\nper structure",
        "max. slots\nper structure",
    )
    for cutoff, degrees in manifest.degrees.items():
        facts = _degree_facts(degrees)
        table.add_row(
            cutoff, f"{facts['mean']:.1f}", str(facts["most"]), f"{degrees.most_edges:,}", f"{degrees.most_slots:,}"
        )
    return table


def _outliers_table(manifest: Manifest) -> Table:
    table = Table(title="outliers", title_justify="left")
    for heading, justify in (("structure", "left"), ("value", "right"), ("", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for label, unit in OUTLIER_UNITS.items():
        for one in manifest.outliers.get(label, [])[:SHOWN_OUTLIERS]:
            table.add_row(one.source_id, f"{one.value:.4g}", unit)
    return table
