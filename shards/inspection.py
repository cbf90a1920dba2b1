"""What a manifest tells, for people and for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hydrazero.shards.manifest import SPLITS, Manifest

HISTOGRAM_BINS = 12
BAR_WIDTH = 40
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
    """Return the manifest's facts as one JSON-ready dict, without the lists of blocks."""
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
        "required_labels": manifest.required_labels,
        "reference_energies": manifest.reference_energies,
        "duplicate_count": manifest.duplicate_count,
        "duplicates": manifest.duplicates,
        "set_aside": manifest.set_aside,
        "source": manifest.source,
        "units": manifest.units,
        "float_dtype": manifest.float_dtype,
    }


def size_bins(histogram: dict[int, int]) -> list[tuple[str, int]]:
    """Gather a histogram of sizes into at most HISTOGRAM_BINS bins of equal width: (label, structures)."""
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
    parts: list[RenderableType] = [Text(f"task {manifest.task}: {manifest.structures():,} structures", style="bold")]
    parts += [_splits_table(manifest), _elements_table(manifest), _sizes_table(manifest), _labels_table(manifest)]
    facts = [f"{key}: {value}" for key, value in manifest.source.items()]
    periodic = f"{manifest.periodic_structures:,} of {manifest.structures():,} structures are periodic"
    notes = [periodic, f"positions, forces and stress are {manifest.float_dtype}, energies float64"]
    if manifest.duplicate_count:
        notes.append(f"{manifest.duplicate_count:,} frames repeat an earlier geometry, first: {manifest.duplicates[0]}")
    notes += [f"set aside, {reason}: {count:,}" for reason, count in manifest.set_aside.items()]
    untrained = sorted(set(manifest.elements) - set(manifest.trained_elements))
    if untrained:
        notes.append(f"no training structure holds {', '.join(untrained)}: no reference energy for them")
    parts.append(Text("\n".join(facts + notes)))
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
    table = _table("elements", "element", "atoms", "reference energy eV")
    for symbol, count in manifest.elements.items():
        reference = manifest.reference_energies.get(symbol)
        table.add_row(symbol, f"{count:,}", "-" if reference is None else f"{reference:.4f}")
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
    # One column a label: with one row a label the table is wider than a terminal of 80 columns.
    table = _table("labels (training split)", "", *(LABEL_HEADINGS[name] for name in manifest.labels))
    labels = list(manifest.labels.values())
    table.add_row("unit", *(LABEL_UNITS[name] for name in manifest.labels))
    table.add_row("values", *(f"{label.count:,}" for label in labels))
    for heading, key in (("lowest", "minimum"), ("highest", "maximum"), ("mean", "mean"), ("rms", "rms")):
        table.add_row(heading, *(f"{getattr(label, key):.6g}" for label in labels))
    return table
