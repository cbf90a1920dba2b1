"""The options of `hydrazero launch`, checked against the site and the run file and turned into a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydrazero.launch.job.hosts import check_hosts, chosen_hosts
from hydrazero.launch.job.job import Job, check_account, check_size, longest_hours
from hydrazero.launch.job.site_file import Site, load_site
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.text.names import check_plain
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.setup import check_run


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """The options of `hydrazero launch`."""

    site_name: str
    """Name of a site, or path of a site file."""
    nodes: int
    ranks_per_node: int | None
    """None: one rank for each device of a node."""
    hours: float | None
    """None: as long as the site allows."""
    account: str
    queue: str
    """Empty: the site's default."""
    hostfile: Path | None
    """Hosts of a site without a scheduler."""
    overrides: tuple[str, ...]
    """Values of the run file that are replaced: 'section.key=value'."""
    resume: bool
    stage: bool
    """Whether shards are copied to the nodes' own disks if the site has them."""


def checked_job(run_file: Path, request: JobRequest, command: str) -> Job:
    """Return a job that its site can run, for a run file that passes the checks of `hydrazero train`.

    `command` is the user's command line, which the job script quotes. Raises HydrazeroError.
    """
    for override in request.overrides:
        check_plain(override, "--set")
    site = load_site(request.site_name)
    config = load_run_config(run_file, request.overrides)
    limited = site.scheduler != "none"
    hours = request.hours or (longest_hours(site, request.nodes, request.queue) if limited else 0.0)
    check_size(site, request.nodes, hours, request.queue)
    check_account(site, request.account)
    hosts, ranks = _hosts(site, request)
    check_run(config, request.resume, has_gpu=site.die.kind == "gpu")
    return Job(
        site=site,
        run_file=run_file,
        run_dir=Path(config.run.out).absolute(),
        tasks=config.tasks,
        overrides=request.overrides,
        resume=request.resume,
        nodes=request.nodes,
        ranks_per_node=ranks,
        hours=hours,
        account=request.account,
        queue=request.queue,
        hostfile=request.hostfile,
        hosts=hosts,
        stage=request.stage and bool(site.files.node_local),
        command=command,
    )


def _hosts(site: Site, request: JobRequest) -> tuple[tuple[str, ...], int]:
    """Return the hosts of a job, which respond, and the number of ranks on each.

    There are none if the job runs on this host or if a scheduler chooses the nodes.
    """
    default = request.ranks_per_node or site.nodes.dies
    if site.scheduler != "none":
        if request.hostfile is not None:
            raise ConfigError("--hostfile is only for sites without a scheduler; a scheduler chooses the nodes itself.")
        return (), default
    if request.hostfile is None:
        if request.nodes > 1:
            raise ConfigError(
                f"--nodes is {request.nodes}, but without a scheduler the hosts must be named: --hostfile FILE."
            )
        return (), default
    hosts, ranks = chosen_hosts(request.hostfile, request.nodes, request.ranks_per_node)
    check_hosts(hosts)
    return hosts, ranks
