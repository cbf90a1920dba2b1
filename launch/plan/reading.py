"""What a planned run reads, how long it takes, and where the site's numbers are from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydrazero.launch.job.job import longest_hours
from hydrazero.launch.job.site_file import Site
from hydrazero.launch.plan.data import TaskData, copying_seconds, reading
from hydrazero.launch.plan.request import Asked
from hydrazero.shards.errors import ConfigError

MANIFEST_READERS = 1
"""Ranks that read each manifest; they tell the others."""


def files(asked: Asked, data: Sequence[TaskData], structures_per_s: float) -> dict[str, Any]:
    """Return what is opened and read, by all ranks together; `structures_per_s` is what a rank consumes."""
    site, lanes = asked.site, asked.ranks * max(asked.config.data.workers, 1)
    config = asked.config
    read = reading(data, config.data.temperature, config.shares, lanes)
    epochs_per_s = asked.ranks * structures_per_s / read.structures
    bandwidth, opens = read.bytes * epochs_per_s, read.blocks * epochs_per_s
    return {
        "shards": read.shards,
        "shards_per_rank": read.shards / asked.ranks,
        "bytes": sum(task.bytes for task in data),
        "amplification": read.bytes / max(sum(task.bytes for task in data), 1.0),
        "manifest_bytes": read.manifest_bytes,
        "opens_at_start": len(data) * MANIFEST_READERS + lanes * len(data),
        "seconds_of_opens_at_start": (len(data) * MANIFEST_READERS + lanes * len(data)) / site.files.opens.value,
        "node_local": site.files.node_local,
        "seconds_of_copying": copying_seconds(data, asked.nodes, site.files) if site.files.node_local else 0.0,
        "opens_per_s": opens,
        "opens_share": opens / site.files.opens.value,
        "bandwidth": bandwidth,
        "bandwidth_share": bandwidth / site.files.bandwidth.value,
    }


def epoch(
    asked: Asked, data: Sequence[TaskData], global_batch: int, seconds: float, copying: float
) -> dict[str, float]:
    """Return steps, time and node-hours of a pass over the data and of the run, whose jobs begin with the copies.

    `seconds` of a step, `copying` seconds of the copies; evaluations and checkpoints are left aside. Raises ConfigError
    if the copies take longer than a job may.
    """
    structures = sum(task.structures for task in data)
    steps = -(-structures // global_batch)
    hours = steps * seconds / 3600
    longest = asked.hours or longest_hours(asked.site, asked.nodes, "")
    run_hours, copy_hours = asked.config.train.steps * seconds / 3600, copying / 3600
    if copy_hours >= longest:
        raise ConfigError(
            f"copying the shards takes {copy_hours:.3g} h of a job's {longest:.3g} h; ask for more --hours."
        )
    run_jobs = max(-(-run_hours // (longest - copy_hours)), 1)
    in_all = run_hours + run_jobs * copy_hours
    return {
        "structures": structures,
        "steps": steps,
        "hours": hours,
        "node_hours": hours * asked.nodes,
        "jobs": -(-hours // longest) if hours > 0 else 0,
        "hours_of_job": longest,
        "run_hours": run_hours,
        "run_epochs": asked.config.train.steps / steps,
        "run_jobs": run_jobs,
        "run_hours_with_copies": in_all,
        "run_node_hours": in_all * asked.nodes,
    }


def sources(site: Site) -> dict[str, dict[str, Any]]:
    """Return every number of the site with where it is from."""
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
