"""Pictures of tasks, as matplotlib figures: elements, sizes, labels, neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hydrazero.shards.manifest import Histogram, Manifest
from hydrazero.shards.periodic_table import COLUMNS, ROWS, place_of

COLOURS = ("#3366aa", "#cc6633", "#338855", "#aa3377", "#776644", "#447799", "#998822", "#884444")
LINES = ("-", "--", ":", "-.")


def element_map(manifests: Sequence[Manifest]) -> Figure:
    """The periodic table, coloured by how many atoms of each element all tasks together have."""
    counts: Counter[str] = Counter()
    for manifest in manifests:
        counts.update(manifest.elements)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    ax = figure.add_subplot()
    ax.set(xlim=(0, COLUMNS), ylim=(ROWS + 0.4, 0), aspect="equal")
    ax.axis("off")
    norm = LogNorm(vmin=1, vmax=max(counts.values()))
    colours = ScalarMappable(norm=norm, cmap="YlGnBu")
    for number in range(1, 119):
        row, column = place_of(number)
        y = row + (0.4 if row >= 7 else 0.0)
        symbol = chemical_symbols[number]
        count = counts.get(symbol, 0)
        face = colours.cmap(norm(count)) if count else "#f4f4f4"
        corner = (column + 0.04, y + 0.04)
        ax.add_patch(Rectangle(corner, 0.92, 0.92, facecolor=face, edgecolor="#cccccc", linewidth=0.5))
        dark = count > 0 and norm(count) > 0.55
        ink = "white" if dark else "#222222" if count else "#aaaaaa"
        ax.text(column + 0.5, y + 0.42, symbol, ha="center", va="center", fontsize=10, color=ink)
        if count:
            ax.text(column + 0.5, y + 0.76, _short(count), ha="center", va="center", fontsize=6.5, color=ink)
    figure.colorbar(colours, ax=ax, shrink=0.55, label="atoms")
    return figure


def _short(count: int) -> str:
    """A count in at most four characters and a unit."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def elements_of_tasks(manifests: Sequence[Manifest]) -> Figure:
    """Which task has which element: shares of each task's atoms."""
    symbols = sorted({s for manifest in manifests for s in manifest.elements}, key=lambda s: atomic_numbers[s])
    shares = np.full((len(manifests), len(symbols)), np.nan)
    for row, manifest in enumerate(manifests):
        for symbol, count in manifest.elements.items():
            shares[row, symbols.index(symbol)] = count / manifest.atoms()
    figure = Figure(figsize=(max(4.0, 0.34 * len(symbols) + 2.6), 0.3 * len(manifests) + 1.3), layout="constrained")
    ax = figure.add_subplot()
    image = ax.imshow(shares, aspect="auto", cmap="YlGnBu", norm=LogNorm(vmin=1e-4, vmax=1))
    ax.set_xticks(range(len(symbols)), symbols, fontsize=8, rotation=90 if len(symbols) > 30 else 0)
    ax.set_yticks(range(len(manifests)), [manifest.task for manifest in manifests], fontsize=8)
    figure.colorbar(image, ax=ax, label="share of the task's atoms")
    return figure


def distributions(manifests: Sequence[Manifest], cutoff: str) -> Figure:
    """Sizes, energies less references, force norms, neighbours: a line per task, each of area or height one."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    axes = [figure.add_subplot(2, 2, number + 1) for number in range(4)]
    for number, manifest in enumerate(manifests):
        line = LINES[number // len(COLOURS) % len(LINES)]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": line}
        _size_line(axes[0], manifest, style)
        _histogram_line(axes[1], manifest.distributions.get("energy_residual_per_atom"), style)
        _histogram_line(axes[2], manifest.distributions.get("force_norm"), style)
        degrees = manifest.degrees.get(cutoff)
        if degrees is not None:
            most = max(degrees.histogram, default=0)
            heights = np.array([degrees.histogram.get(degree, 0) for degree in range(most + 1)], dtype=float)
            axes[3].step(range(most + 1), heights / heights.max(), where="mid", linewidth=1.3, **style)
    axes[0].set(title="atoms per structure", xlabel="atoms", ylabel="structures, of the most frequent", xscale="log")
    axes[1].set(title="energy less references (training)", xlabel="eV/atom", ylabel="structures")
    axes[1].set_xscale("symlog", linthresh=0.1)
    axes[2].set(title="force norm (training)", xlabel="eV/Å", ylabel="atoms", xscale="log")
    axes[3].set(title=f"neighbours within {cutoff} Å", xlabel="neighbours", ylabel="atoms")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=8)
    return figure


def _size_line(ax: Axes, manifest: Manifest, style: dict[str, Any]) -> None:
    sizes = sorted(manifest.size_histogram)
    heights = np.array([manifest.size_histogram[size] for size in sizes], dtype=float)
    ax.plot(sizes, heights / heights.max(), marker=".", markersize=4, linewidth=0.9, label=manifest.task, **style)


def _histogram_line(ax: Axes, histogram: Histogram | None, style: dict[str, Any]) -> None:
    if histogram is None or not any(histogram.counts):
        return
    counts = np.array(histogram.counts, dtype=float)
    ax.stairs(counts / counts.max(), histogram.edges, linewidth=1.3, **style)
