"""What the three ways to run jobs differ in: no scheduler, Slurm, PBS."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """How a scheduler is spoken to, on the command line and in a job's script."""

    shell: str
    """First line of a script."""
    prefix: str
    """Of its directives in a script."""
    quoted: Callable[[str], str]
    """Returns a text as a word of a directive."""
    submit: tuple[str, ...]
    """Command that submits a script."""
    version: tuple[str, ...]
    """Command that prints its version."""
    signals: bool
    """Whether it sends the script SIGUSR1 before the job's time is over; if not, the ranks' watchers count."""
    own_group: bool
    """Whether the launcher gets a group of processes of its own, all of which are told, since it passes on nothing."""
    tells: str
    """Signal that the launcher is sent for one that the script was sent (`$1`)."""
    job: str
    """Lines that set `job` (its number), and `again` if the job has been started before."""
    meet: str
    """Lines that set `first`, the node that ranks meet on, and `port`."""
    each_node: str
    """Functions of the shell: `on_each_node SECONDS COMMAND...` runs a command once on every node, and fails if one of
    them does or has no time left; `node_names` prints the names of the nodes."""


def slurm_quoted(text: str) -> str:
    """Return a text as sbatch reads it: in double quotes, and `%` twice, which stands for numbers of jobs in paths."""
    doubled = text.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./-]+", doubled, re.ASCII):
        return doubled
    return '"' + re.sub(r'(["\\])', r"\\\1", doubled) + '"'


SLURM = Scheduler(
    shell="#!/bin/bash",
    prefix="#SBATCH",
    quoted=slurm_quoted,
    submit=("sbatch", "--parsable"),
    version=("sinfo", "--version"),
    signals=True,
    own_group=False,
    tells="USR1",  # srun passes it on, and kills its ranks at a SIGTERM
    job="""\
job=$SLURM_JOB_ID
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then again=yes; fi""",
    meet="""\
# The address by which Slurm itself reaches the first node, and a port that another job is unlikely to have.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
first=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
port=$((15000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 16000))""",
    each_node="""\
on_each_node() { within "$1" srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 "${@:2}"; }
node_names() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }""",
)
PBS = Scheduler(
    shell="#!/bin/bash -l",
    prefix="#PBS",
    quoted=shlex.quote,  # qsub knows both quotes and no backslashes
    submit=("qsub",),
    version=("qstat", "--version"),
    signals=False,
    own_group=False,
    tells='"$1"',
    job="""\
job=$PBS_JOBID
# PBS does not say that it has started a job before, but then there is a try of its number.
if grep -qsF "\\"$job\\"" "$launch"/attempt-*/job.json; then again=yes; fi""",
    meet="""\
first=$(head -n 1 "$PBS_NODEFILE")
port=$((15000 + ${PBS_JOBID%%.*} % 16000))""",
    each_node="""\
on_each_node() { within "$1" mpiexec -n {nodes} -ppn 1 "${@:2}"; }
node_names() { sort -u "$PBS_NODEFILE"; }""",
)
NONE = Scheduler(
    shell="#!/bin/bash",
    prefix="",
    quoted=str,
    submit=("bash",),
    version=(),
    signals=False,
    own_group=True,
    tells='"$1"',
    job="job=$$",
    meet="""\
first={first_host}
port=$((15000 + $$ % 16000))""",
    each_node="""\
on_each_node() { within "$1" "${@:2}"; }
node_names() { uname -n; }""",
)
OVER_SSH = """\
# The same folder and words on each host; lines that come back carry the host's name.
on_each_node() {
    within "$1" pdsh -R ssh -S -w "{host_list}" "cd $(printf %q "$PWD"); $(printf '%q ' "${@:2}")"
}
node_names() { echo {hosts}; }"""
"""`each_node` where the nodes are the hosts of a hostfile."""
SCHEDULERS = {"none": NONE, "slurm": SLURM, "pbs": PBS}
