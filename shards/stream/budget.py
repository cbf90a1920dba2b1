"""Check that a batch can hold the structures of a task, by the numbers of neighbours in its manifest."""

from __future__ import annotations

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.graphs.neighbours import ROW_SLOTS
from hydrazero.shards.manifest import Manifest
from hydrazero.shards.manifest_parts import Degrees

Counted = tuple[float, Degrees]
"""A cutoff in Å, and the numbers of neighbours within it."""


def degrees_around(manifest: Manifest, cutoff: float) -> tuple[Counted | None, Counted | None]:
    """Return the counts for the largest cutoff up to `cutoff` (Å), and for the smallest from `cutoff` on."""
    counted = sorted((float(text), degrees) for text, degrees in manifest.degrees.items())
    below = next((each for each in reversed(counted) if each[0] <= cutoff + 1e-9), None)
    return below, next((each for each in counted if each[0] >= cutoff - 1e-9), None)


def degrees_within(manifest: Manifest, cutoff: float) -> Counted | None:
    """Return the smallest counted cutoff from `cutoff` (Å) on, with its counts; None if there is none."""
    return degrees_around(manifest, cutoff)[1]


def may_exceed(manifest: Manifest, shape: BatchShape, cutoff: float) -> bool:
    """Return whether structures that `check_budget` accepts may still be too large for a batch."""
    found = degrees_within(manifest, cutoff)
    return found is None or not _fit(found[1], shape)


def _fit(degrees: Degrees, shape: BatchShape) -> bool:
    return degrees.most_slots <= shape.rows * ROW_SLOTS and degrees.most_edges <= shape.most_edges


def check_budget(name: str, manifest: Manifest, shape: BatchShape, cutoff: float) -> None:
    """Raise ConfigError, with the structure and the setting that it needs, if no batch can hold one of the task.

    Neighbours are counted within `cutoff` (Å), or within the next smaller cutoff of the manifest; see `may_exceed`.
    """
    if manifest.max_atoms > shape.atoms:
        raise ConfigError(
            f"task '{name}' has a structure of {manifest.max_atoms} atoms, but a batch holds {shape.atoms}; "
            f"set batch.atoms to at least {manifest.max_atoms}."
        )
    found, _ = degrees_around(manifest, cutoff)
    if found is None:
        return
    radius, degrees = found
    within = f"within {radius:g} Å"
    if degrees.most_slots > shape.rows * ROW_SLOTS:
        raise ConfigError(
            f"task '{name}': {degrees.most_slots_in} takes {degrees.most_slots} neighbour slots {within}, but a "
            f"batch holds {shape.slots}; set batch.slots to at least {degrees.most_slots}."
        )
    if degrees.most_edges > shape.most_edges:
        raise ConfigError(
            f"task '{name}': {degrees.most_edges_in} has {degrees.most_edges} edges {within}, but a batch holds "
            f"{shape.edges}; set batch.edges to at least {degrees.most_edges}, or to 0."
        )
