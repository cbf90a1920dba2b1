"""What a planned run reads, how long an epoch and the run take, and where the site's numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydrazero.launch.job.job import longest_hours
from hydrazero.launch.job.site_file import Site
from hydrazero.launch.plan.data import TaskData, copying_seconds, epoch_reads
from hydrazero.launch.plan.request import PlanRequest
from hydrazero.shards.errors import ConfigError

MANIFEST_READERS = 1
"""Number of ranks that read each manifest and send it to the others."""


def file_access(request: PlanRequest, data: Sequence[TaskData], structures_per_s: float) -> dict[str, Any]:
    """Return what all ranks together open and read; each rank consumes `structures_per_s` structures per second."""
    site, settings = request.site, request.settings
    lanes = request.ranks * max(settings.workers, 1)
    read = epoch_reads(data, settings.temperature, settings.shares, lanes)
    epochs_per_s = request.ranks * structures_per_s / read.structures
    bandwidth, opens = read.bytes * epochs_per_s, read.blocks * epochs_per_s
    return {
        "shards": read.shards,
        "shards_per_rank": read.shards / request.ranks,
        "bytes": sum(task.bytes for task in data),
        "amplification": read.bytes / max(sum(task.bytes for task in data), 1.0),
        "manifest_bytes": read.manifest_bytes,
        "opens_at_start": len(data) * MANIFEST_READERS + lanes * len(data),
        "seconds_of_opens_at_start": (len(data) * MANIFEST_READERS + lanes * len(data)) / site.files.opens.value,
        "node_local": site.files.node_local,
        "seconds_of_copying": copying_seconds(data, request.nodes, site.files) if site.files.node_local else 0.0,
        "opens_per_s": opens,
        "opens_share": opens / site.files.opens.value,
        "bandwidth": bandwidth,
        "bandwidth_share": bandwidth / site.files.bandwidth.value,
    }


def epoch_costs(
    request: PlanRequest, data: Sequence[TaskData], global_batch: int, seconds: float, copying: float
) -> dict[str, float]:
    """Return steps, time and node-hours of an epoch and of the whole run.

    A step takes `seconds`; every job begins by copying the shards, which takes `copying` seconds. Validation and
    checkpoints are not counted. Raise ConfigError if copying takes longer than a job may last.
    """
    structures = sum(task.structures for task in data)
    steps = -(-structures // global_batch)
    hours = steps * seconds / 3600
    longest = request.hours or longest_hours(request.site, request.nodes, "")
    run_hours, copy_hours = request.settings.steps * seconds / 3600, copying / 3600
    if copy_hours >= longest:
        raise ConfigError(
            f"copying the shards takes {copy_hours:.3g} h, but a job lasts {longest:.3g} h; request more --hours."
        )
    run_jobs = max(-(-run_hours // (longest - copy_hours)), 1)
    total_hours = run_hours + run_jobs * copy_hours
    return {
        "structures": structures,
        "steps": steps,
        "hours": hours,
        "node_hours": hours * request.nodes,
        "jobs": -(-hours // longest) if hours > 0 else 0,
        "hours_of_job": longest,
        "run_hours": run_hours,
        "run_epochs": request.settings.steps / steps,
        "run_jobs": run_jobs,
        "run_hours_with_copies": total_hours,
        "run_node_hours": total_hours * request.nodes,
    }


def sources(site: Site) -> dict[str, dict[str, Any]]:
    """Return every number of the site with its source."""
    named = {
        "nodes.memory": site.nodes.memory,
        "die.memory": site.die.memory,
        "die.memory_bandwidth": site.die.memory_bandwidth,
        **{f"die.flops.{key}": value for key, value in site.die.flops.items()},
        "node_link.bandwidth": site.node_link.bandwidth,
        "network.bandwidth": site.network.bandwidth,
        "files.bandwidth": site.files.bandwidth,
        "files.opens": site.files.opens,
        **({"files.node_local_write": site.files.node_local_write} if site.files.node_local_write else {}),
    }
    return {name: measure.model_dump() for name, measure in named.items()}
