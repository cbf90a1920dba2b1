"""The texts of a site file for one job: places in them filled in."""

from __future__ import annotations

import re
import shlex

from hydrazero.launch.job import Job
from hydrazero.shards.errors import ConfigError, did_you_mean

PLACE = re.compile(r"(?<!\$)\{(\w+)\}")
"""Of a text in a site file; with a dollar before it, it is the shell's."""
MAY_BE_EMPTY = ("hosts",)
"""Places of which a text may have nothing."""


def places(job: Job) -> dict[str, str]:
    """Return what stands for each place in the texts of a site file."""
    minutes = round(60 * job.hours)
    hosts = ""
    if job.hosts and job.hostfile is not None:
        file = shlex.quote(str(job.hostfile.absolute()))
        hosts = f'--hostfile={file} --num_nodes={job.nodes} --master_addr="$MASTER_ADDR" --no_ssh_check --force_multi'
    return {
        "nodes": str(job.nodes),
        "dies": str(job.ranks_per_node),
        "gpus": str(job.gpus_per_node or ""),
        "ranks": str(job.ranks),
        "cores": str(job.site.nodes.cores),
        "hours": f"{job.hours:g}" if job.hours else "",
        "walltime": f"{minutes // 60}:{minutes % 60:02d}:00" if job.hours else "",
        "name": job.run_dir.name,
        "account": job.account,
        "queue": job.queue or job.site.job.queue,
        "output": str(job.launch_dir / "job"),
        "stop_before": f"{job.site.job.stop_before:g}",
        "node_local": job.site.files.node_local,
        "python": '"$python"',
        "bin": '"$bin"',
        "hosts": hosts,
    }


def filled(text: str, values: dict[str, str], where: str) -> str | None:
    """Return a text with its places filled in, None if there is nothing for one; ConfigError for an unknown one."""
    names = PLACE.findall(text)
    for name in names:
        if name not in values:
            hint = did_you_mean(name, list(values))
            raise ConfigError(f"{where} has the place {{{name}}}, which is not known{hint}.")
    if any(not values[name] and name not in MAY_BE_EMPTY for name in names):
        return None
    return PLACE.sub(lambda match: values[match[1]], text)


def all_filled(job: Job, key: str, values: dict[str, str]) -> list[str]:
    """Return the texts of a list of a site's [job] with their places filled in, less those that are left out."""
    where = f"site {job.site.name}: job.{key}"
    lines = (filled(text, values, f"{where}[{n}]") for n, text in enumerate(getattr(job.site.job, key)))
    return [line for line in lines if line is not None]
