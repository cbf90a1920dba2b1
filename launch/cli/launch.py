"""The commands `launch` and `postmortem`: jobs on clusters, and how they ended."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hydrazero.shards.errors import ConfigError

if TYPE_CHECKING:
    from hydrazero.launch.job.job import Job
    from hydrazero.launch.job.site_file import Site

FOLDER = click.Path(path_type=Path)


def _list_sites(context: click.Context, _: Any, wanted: bool) -> None:
    """Print the sites and end."""
    if not wanted:
        return
    from hydrazero.launch.job.site_file import load_site, site_names

    for name in site_names():
        click.secho(name, bold=True)
        click.echo(f"    {load_site(name).about}")
    context.exit()


@click.command("launch")
@click.argument("run_file", metavar="RUN.toml", type=FOLDER)
@click.option("--site", "site_name", required=True, metavar="NAME|FILE.toml", help="Where to run.")
@click.option(
    "--list-sites", is_flag=True, is_eager=True, expose_value=False, callback=_list_sites, help="Show the sites."
)
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1))
@click.option(
    "--ranks-per-node", type=click.IntRange(1), help="Processes on each node.  [default: one for each of its dies]"
)
@click.option("--hours", type=click.FloatRange(0, min_open=True), help="Time of the job.  [default: the site's most]")
@click.option("--account", default="", help="That the job is charged to.")
@click.option("--queue", default="", help="Partition, queue or QOS.  [default: the site's]")
@click.option("--hostfile", type=FOLDER, help="'HOST slots=N' lines: hosts for a site without a scheduler.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value of the run file."
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the run.")
@click.option("--stage/--no-stage", default=True, help="Copy shards to the nodes' own disks, if the site has them.")
@click.option("--submit", "submitted", is_flag=True, help="Hand the script to the scheduler, or run it without one.")
def launch_command(run_file: Path, submitted: bool, **asked: Any) -> None:
    """Write the job script that trains RUN.toml on the nodes of a cluster.

    It stands in the run's folder, is commented, and can be changed and submitted by hand. A job whose time is over, or
    which loses a node, goes back into the queue and on from the last checkpoint; hydrazero postmortem says how each try
    ended.
    """
    from hydrazero.launch.job.submit import check_scheduler, submit, write_script

    job = checked_job(run_file, **asked)
    if submitted:
        check_scheduler(job.site)
    script = write_script(job)
    shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    if not submitted:
        click.echo(str(shown))
    elif job.site.scheduler == "none":
        os.execvp("bash", ["bash", str(script)])  # Ctrl-C is the script's, which waits for the ranks' checkpoint
    else:
        click.echo(f"job {submit(job.site, script)}: {shown}")


def checked_job(
    run_file: Path,
    *,
    site_name: str,
    nodes: int,
    ranks_per_node: int | None,
    hours: float | None,
    account: str,
    queue: str,
    hostfile: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    stage: bool,
) -> Job:
    """Return a job that its site can run, of a run file that passes the checks of `train`; raises HydrazeroError."""
    from hydrazero.launch.job.job import Job, check_account, check_size, longest_hours
    from hydrazero.launch.job.site_file import load_site
    from hydrazero.trainer.config.run_file import load_run_config
    from hydrazero.trainer.setup import check_run

    site = load_site(site_name)
    config = load_run_config(run_file, overrides)
    limited = site.scheduler != "none"
    time = hours or (longest_hours(site, nodes, queue) if limited else 0.0)
    check_size(site, nodes, time, queue)
    check_account(site, account)
    hosts, ranks = _hosts(site, hostfile, nodes, ranks_per_node)
    check_run(config, resume, has_gpu=site.die.kind == "gpu")
    return Job(
        site=site,
        run_file=run_file,
        config=config,
        overrides=overrides,
        resume=resume,
        nodes=nodes,
        ranks_per_node=ranks,
        hours=time,
        account=account,
        queue=queue,
        hostfile=hostfile,
        hosts=hosts,
        stage=stage and bool(site.files.node_local),
        command=shlex.join(["hydrazero", *sys.argv[1:]]),
    )


def _hosts(site: Site, hostfile: Path | None, nodes: int, ranks_per_node: int | None) -> tuple[tuple[str, ...], int]:
    """Return a job's hosts, which answer, none if it runs here or a scheduler chooses them; and the ranks on each."""
    from hydrazero.launch.job.hosts import check_hosts, chosen_hosts

    usual = ranks_per_node or site.nodes.dies
    if site.scheduler != "none":
        if hostfile is not None:
            raise ConfigError("--hostfile is for sites without a scheduler, which chooses the nodes itself.")
        return (), usual
    if hostfile is None:
        if nodes > 1:
            raise ConfigError(f"--nodes is {nodes}, but without a scheduler the hosts must be named: --hostfile FILE.")
        return (), usual
    hosts, ranks = chosen_hosts(hostfile, nodes, ranks_per_node)
    check_hosts(hosts)
    return hosts, ranks


@click.command("postmortem")
@click.argument("run_dir", type=FOLDER)
@click.option(
    "--retries",
    default=3,
    show_default=True,
    type=click.IntRange(0),
    help="Failures without a new checkpoint between them, after which a job should not go on.",
)
@click.option(
    "--wait",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds that ranks which still live are waited for.",
)
def postmortem_command(run_dir: Path, retries: int, wait: float) -> None:
    """Say how the tries of a launched run ended: which rank failed first, and why.

    Ends with status 0 if the run is complete or was ended on purpose, 75 if the job should go on, 1 if it should not.
    """
    from hydrazero.launch.postmortem import FAILED, GOES_ON, OVER, REFUSED, STOPPED, goes_on, job_of, judge_tries

    tries = judge_tries(run_dir, wait)
    for number, (folder, verdict) in enumerate(tries, start=1):
        job = job_of(folder)
        click.echo(f"try {number}{f' ({job})' if job else ''}: {verdict.sentence}")
        for line in verdict.details:
            click.echo(f"    {line}")
    verdicts = [verdict for _, verdict in tries]
    again, why_not = goes_on(verdicts, retries)
    if why_not:
        click.echo(f"the job does not go on: {why_not}")
    ended_badly = verdicts[-1].kind in (REFUSED, FAILED) or (verdicts[-1].kind == STOPPED and not again)
    sys.exit(GOES_ON if again else OVER if ended_badly else 0)
