"""Plots of tasks as matplotlib figures: elements, sizes, labels, neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hydrazero.launch.cli.views.periodic_table import COLUMNS, ROWS, place_of
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.manifest_parts import Histogram
from hydrazero.shards.text.foreign_text import for_plot

COLOURS = ("#3366aa", "#cc6633", "#338855", "#aa3377", "#776644", "#447799", "#998822", "#884444")


def element_map(manifests: Sequence[Manifest]) -> Figure:
    """Return the periodic table, coloured by the number of atoms of each element in all tasks together."""
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
    """Return a count in at most four characters and a unit."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def elements_of_tasks(manifests: Sequence[Manifest]) -> Figure:
    """Return a map of the fraction of each element in each task's atoms."""
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
    figure.colorbar(image, ax=ax, label="fraction of atoms")
    return figure


def distributions(manifests: Sequence[Manifest], cutoff: str) -> Figure:
    """Return histograms of sizes, energies minus references, force norms and neighbours, one row per task."""
    height = 2.2 + 0.3 * len(manifests)
    figure = Figure(figsize=(11, 2 * height), layout="constrained")
    axes = [figure.add_subplot(2, 2, number + 1) for number in range(4)]
    for number, manifest in enumerate(manifests):
        row = len(manifests) - 1 - number
        colour = COLOURS[number % len(COLOURS)]
        sizes = sorted(manifest.size_histogram)
        heights = np.array([manifest.size_histogram[size] for size in sizes], dtype=float)
        axes[0].vlines(sizes, row, row + 0.9 * heights / heights.max(), color=colour, linewidth=1.6)
        _ridge(axes[1], manifest.distributions.get("energy_residual_per_atom"), row, colour)
        _ridge(axes[2], manifest.distributions.get("force_norm"), row, colour)
        degrees = manifest.degrees.get(cutoff)
        if degrees is not None:
            edges = np.arange(max(degrees.histogram, default=0) + 2) - 0.5
            counts = [degrees.histogram.get(degree, 0) for degree in range(len(edges) - 1)]
            _ridge(axes[3], Histogram(edges=edges.tolist(), counts=counts), row, colour)
    axes[0].set(title="atoms per structure", xlabel="atoms", xscale="log")
    axes[1].set(title="energy minus reference energies (training)", xlabel="eV/atom")
    _symlog(axes[1], 0.1)
    axes[2].set(title="force norm (training)", xlabel="eV/Å", xscale="log")
    axes[3].set(title=for_plot(f"neighbours within {cutoff} Å"), xlabel="neighbours")
    _symlog(axes[3], 50.0)
    for place, ax in enumerate(axes):
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.grid(axis="x", alpha=0.25, linewidth=0.5)
        names = [manifest.task for manifest in manifests] if place % 2 == 0 else [""] * len(manifests)
        ax.set_yticks(range(len(manifests)), names[::-1], fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(-0.1, len(manifests))
    return figure


def _symlog(ax: Axes, linear: float) -> None:
    """Make an axis logarithmic beyond `linear`; one that ends before stays linear, with round ticks."""
    if max(map(abs, ax.get_xlim())) > linear:
        ax.set_xscale("symlog", linthresh=linear)


def _ridge(ax: Axes, histogram: Histogram | None, row: int, colour: str) -> None:
    """Draw a filled histogram whose baseline is `row`."""
    if histogram is None or not any(histogram.counts):
        return
    counts = np.array(histogram.counts, dtype=float)
    heights = row + 0.9 * counts / counts.max()
    ax.stairs(heights, histogram.edges, baseline=row, fill=True, color=colour, alpha=0.55)
    ax.stairs(heights, histogram.edges, baseline=row, color=colour, linewidth=0.8)
