"""The page of `hydrazero inspect --html`: tasks side by side, with plots, in one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydrazero.launch.cli.views.inspect_plots import distributions, element_map, elements_of_tasks
from hydrazero.launch.cli.views.shards_view import SIDE_BY_SIDE, side_by_side_rows
from hydrazero.launch.cli.views.target_table import TARGET_HEADINGS, target_rows
from hydrazero.launch.cli.views.task_notes import task_notes
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.text.foreign_text import for_html
from hydrazero.trainer.report.markup import picture
from hydrazero.trainer.report.markup import write_page as write_document

OUTLIERS = {
    "energy_residual_per_atom": ("energy minus references", "eV/atom from the mean"),
    "force_norm": ("largest force", "eV/Å"),
    "stress": ("largest component of the stress", "eV/Å³"),
}
"""Label -> heading and unit of its outliers."""


def write_page(manifests: Sequence[Manifest], cutoff: str, out: Path) -> None:
    """Write the page to a temporary file and rename it; raise OSError if that fails."""
    total = sum(manifest.structures() for manifest in manifests)
    title = manifests[0].task if len(manifests) == 1 else f"{len(manifests)} tasks"
    parts = [
        f'<h1>{for_html(title)}</h1><p class="facts">{total:,} structures, '
        f"{sum(manifest.atoms() for manifest in manifests):,} atoms</p>",
        _overview(manifests, cutoff),
        "<h2>Elements</h2>",
        picture(element_map(manifests), "periodic table coloured by the number of atoms"),
    ]
    if len(manifests) > 1:
        parts.append(picture(elements_of_tasks(manifests), "fraction of each element in each task's atoms"))
    parts += ["<h2>Sizes, labels, neighbours</h2>", picture(distributions(manifests, cutoff), "distributions")]
    if any(manifest.targets for manifest in manifests):
        parts += ["<h2>Targets of the training split</h2>", *(_targets(manifest) for manifest in manifests)]
    parts += ["<h2>Outliers</h2>", *(_outliers(manifest) for manifest in manifests)]
    parts += ["<h2>Sources</h2>", *(_source(manifest) for manifest in manifests)]
    write_document(title, parts, out)


def _overview(manifests: Sequence[Manifest], cutoff: str) -> str:
    headings = "".join(f"<th>{for_html(text)}</th>" for text in SIDE_BY_SIDE)
    rows = "".join(
        f"<tr>{''.join(f'<td>{for_html(cell)}</td>' for cell in row)}</tr>"
        for row in side_by_side_rows(manifests, cutoff)
    )
    return (
        f'<h2>Overview</h2><div class="scroll"><table><tr>{headings}</tr>{rows}</table></div>'
        f"<p>Energy: root mean square of the energy minus reference energies, meV/atom. Forces: root mean square, "
        f"eV/Å. Neighbours: mean and maximum number of neighbours of an atom within {for_html(cutoff)} Å.</p>"
    )


def _targets(manifest: Manifest) -> str:
    headings = "".join(f"<th>{for_html(text)}</th>" for text in TARGET_HEADINGS)
    rows = "".join(f"<tr>{''.join(f'<td>{for_html(cell)}</td>' for cell in row)}</tr>" for row in target_rows(manifest))
    if not rows:
        return ""
    table = f'<div class="scroll"><table><tr>{headings}</tr>{rows}</table></div>'
    return f'<p class="facts"><b>{for_html(manifest.task)}</b></p>{table}'


def _outliers(manifest: Manifest) -> str:
    cells = []
    for label, (heading, unit) in OUTLIERS.items():
        rows = "".join(
            f'<tr><td class="text">{for_html(one.source_id)}</td><td>{one.value:.4g}</td></tr>'
            for one in manifest.outliers.get(label, [])[:5]
        )
        cells.append(f'<table><tr><th class="text">{heading}</th><th>{unit}</th></tr>{rows}</table>' if rows else "")
    if not any(cells):
        return ""
    tables = f'<div class="scroll">{"".join(cells)}</div>'
    return f"<details open><summary>{for_html(manifest.task)}</summary>{tables}</details>"


def _source(manifest: Manifest) -> str:
    facts = [f"{key}: {value}" for key, value in manifest.source.items()]
    facts += [f"skipped, {reason}: {count:,}" for reason, count in manifest.set_aside.items()]
    if manifest.duplicate_count:
        facts.append(f"{manifest.duplicate_count:,} structures repeat an earlier geometry")
    facts += task_notes(manifest)
    lines = "<br>".join(for_html(fact) for fact in facts)
    return f'<p class="facts"><b>{for_html(manifest.task)}</b><br>{lines}</p>'
