"""The commands `launch` and `postmortem`: jobs on clusters."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from hydrazero.launch.cli.options import FOLDER, NODES, RANKS_PER_NODE, SITE, set_option
from hydrazero.shards.text.foreign_text import echo


def _list_sites(context: click.Context, _: Any, requested: bool) -> None:
    """Print the sites and exit."""
    if not requested:
        return
    from hydrazero.launch.job.site_file import load_site, site_names

    for name in site_names():
        click.secho(name, bold=True)
        echo(f"    {load_site(name).about}")
    context.exit()


@click.command("launch")
@click.argument("run_file", metavar="RUN.toml", type=FOLDER)
@SITE
@click.option(
    "--list-sites",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_sites,
    help="List the sites and exit.",
)
@NODES
@RANKS_PER_NODE
@click.option(
    "--hours",
    type=click.FloatRange(0, min_open=True),
    metavar="H",
    help="Time limit of the job.  [default: the longest that the site allows]",
)
@click.option("--account", default="", metavar="NAME", help="Account that is charged for the job.")
@click.option("--queue", default="", metavar="NAME", help="Partition, queue or QOS.  [default: the site's]")
@click.option(
    "--hostfile",
    metavar="FILE",
    type=FOLDER,
    help="File of 'HOST slots=N' lines that names the hosts of a site without a scheduler.",
)
@set_option
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint of the run.")
@click.option(
    "--stage/--no-stage",
    default=True,
    show_default=True,
    help="Copy the shards to the nodes' own disks, if the site has them.",
)
@click.option(
    "--submit", "submitted", is_flag=True, help="Submit the script to the scheduler, or run it if there is none."
)
def launch_command(run_file: Path, submitted: bool, **request: Any) -> None:
    """Write the job script for a cluster, and submit it on request.

    The script trains RUN.toml. It is written to the run folder, has comments, and can be edited and submitted by hand.
    A job that reaches its time limit or loses a node is requeued and continues from the last checkpoint; 'hydrazero
    postmortem' explains how each attempt ended.
    """
    from hydrazero.launch.job.job_request import JobRequest, checked_job
    from hydrazero.launch.job.submit import check_scheduler, submit, write_script

    job = checked_job(run_file, JobRequest(**request), shlex.join(["hydrazero", *sys.argv[1:]]))
    if submitted:
        check_scheduler(job.site)
    script = write_script(job)
    shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    if not submitted:
        echo(str(shown))
    elif job.site.scheduler == "none":
        # Ctrl-C then reaches the script, which waits until the ranks have written a checkpoint.
        os.execvp("bash", ["bash", str(script)])
    else:
        echo(f"job {submit(job.site, script)}: {shown}")


@click.command("postmortem")
@click.argument("run_dir", metavar="RUN", type=FOLDER)
@click.option(
    "--retries",
    default=3,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="Number of failures without a new checkpoint in between after which a job should not be restarted.",
)
@click.option(
    "--wait",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Maximum time to wait for ranks that are still running.",
)
def postmortem_command(run_dir: Path, retries: int, wait: float) -> None:
    """Explain how the attempts of a launched job ended.

    It names the rank that failed first and the reason. The exit status is 0 if the run is complete or was ended on
    purpose, 75 if the job should be restarted, and 1 if it should not.
    """
    from hydrazero.launch.postmortem import job_status, job_summary, judge_attempts

    attempts = judge_attempts(run_dir, wait)
    for line in job_summary(attempts, retries):
        echo(line)
    sys.exit(job_status([verdict for _, verdict in attempts], retries))
