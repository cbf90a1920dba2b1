"""Whether the structures of a task fit a batch, and which batch suits a number of tasks."""

from __future__ import annotations

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.graph import BatchShape
from hydrazero.shards.manifest import Degrees, Manifest
from hydrazero.shards.neighbours import ROW_SLOTS


def degrees_within(manifest: Manifest, cutoff: float) -> tuple[float, Degrees] | None:
    """Return the smallest counted cutoff that is not below `cutoff`, with its counts; None if there is none."""
    counted = sorted((float(text), degrees) for text, degrees in manifest.degrees.items())
    return next(((radius, degrees) for radius, degrees in counted if radius >= cutoff - 1e-9), None)


def check_budget(name: str, manifest: Manifest, shape: BatchShape, cutoff: float) -> None:
    """Raise ConfigError, saying which structure and what it needs, if one of the task's cannot fit any batch.

    Neighbours are those within the counted cutoff next above `cutoff` (Å); beyond the largest, they are not checked.
    """
    if manifest.max_atoms > shape.atoms:
        raise ConfigError(
            f"task '{name}' has a structure of {manifest.max_atoms} atoms, a batch holds {shape.atoms}: "
            f"set batch.atoms to at least {manifest.max_atoms}."
        )
    found = degrees_within(manifest, cutoff)
    if found is None:
        return
    radius, degrees = found
    within = f"within {radius:g} Å"
    if degrees.most_slots > shape.rows * ROW_SLOTS:
        raise ConfigError(
            f"task '{name}': {degrees.most_slots_in} takes {degrees.most_slots} neighbour slots {within}, a batch "
            f"holds {shape.slots}: set batch.slots to at least {degrees.most_slots}."
        )
    if degrees.most_edges > shape.most_edges:
        raise ConfigError(
            f"task '{name}': {degrees.most_edges_in} has {degrees.most_edges} edges {within}, a batch holds "
            f"{shape.edges}: set batch.edges to at least {degrees.most_edges}, or to 0."
        )
