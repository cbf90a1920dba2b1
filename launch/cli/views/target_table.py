"""Statistics of a task's targets, as rows of texts and as a table."""

from __future__ import annotations

from rich.table import Table

from hydrazero.shards.manifest import Manifest

TARGET_HEADINGS = ("target", "values", "labelled", "min", "max", "mean", "std dev")


def target_rows(manifest: Manifest) -> list[list[str]]:
    """Return a row of texts for each target of the training split, in the columns TARGET_HEADINGS."""
    rows = []
    for name, facts in manifest.targets.items():
        kind = f"{facts.of}{' vector' if facts.kind == 'vector' else ''}"
        about = ", ".join(filter(None, (kind, f"{facts.unit}{'/atom' if facts.extensive else ''}")))
        owners = manifest.atoms("train") if facts.of == "atom" else manifest.structures("train")
        known = facts.count / (owners * (3 if facts.kind == "vector" else 1))
        numbers = (facts.minimum, facts.maximum, facts.mean, facts.deviation)
        rows.append([f"{name} ({about})", f"{facts.count:,}", f"{known:.1%}", *(f"{n:.4g}" for n in numbers)])
    return rows


def targets_table(manifest: Manifest) -> Table:
    """Return a table of the targets of the training split, for a terminal."""
    table = Table(title="targets (training split)", title_justify="left")
    for heading in TARGET_HEADINGS:
        # Long names are wrapped; numbers must not be cut.
        first = heading == TARGET_HEADINGS[0]
        table.add_column(heading, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in target_rows(manifest):
        table.add_row(*row)
    return table
