"""The differences between the schedulers for which scripts are written: none, Slurm and PBS."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """The commands of a scheduler, and what is special to it in a job's script."""

    shell: str
    """First line of a script."""
    prefix: str
    """Prefix of directives in a script."""
    quoted: Callable[[str], str]
    """Function that quotes a text as a word of a directive."""
    submit: tuple[str, ...]
    """Command that submits a script."""
    version: tuple[str, ...]
    """Command that prints its version."""
    signals: bool
    """Whether the scheduler sends SIGUSR1 to the script before the time limit; if not, the ranks count the time."""
    own_group: bool
    """Whether the launcher gets its own process group, to which signals are sent since it does not forward them."""
    forwarded: str
    """Signal that is sent to the launcher when the script receives the signal `$1`."""
    job: str
    """Lines that set `job` (its number), and `restarted` if the job has been started before."""
    master: str
    """Lines that set `first`, the node on which ranks find each other, and `port`."""
    each_node: str
    """Shell functions: `on_each_node SECONDS COMMAND...` runs a command once on every node, and fails if it fails on
    one of them or takes too long; `node_names` prints the names of the nodes."""


def slurm_quoted(text: str) -> str:
    """Return a text quoted for sbatch: in double quotes, and with `%` doubled, since it begins a pattern in paths."""
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
    forwarded="USR1",  # srun forwards it to its ranks, but kills them at a SIGTERM
    job="""\
job=$SLURM_JOB_ID
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then restarted=yes; fi""",
    master="""\
# The address at which Slurm itself reaches the first node, and a port that another job is unlikely to use.
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
    quoted=shlex.quote,  # qsub supports both kinds of quotes, but no backslashes
    submit=("qsub",),
    version=("qstat", "--version"),
    signals=False,
    own_group=False,
    forwarded='"$1"',
    job="""\
job=$PBS_JOBID
# PBS does not say that it has started a job before, but then there is an attempt with its number.
if grep -qsF "\\"$job\\"" "$launch"/attempt-*/job.json; then restarted=yes; fi""",
    master="""\
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
    forwarded='"$1"',
    job="job=$$",
    master="""\
first={first_host}
port=$((15000 + $$ % 16000))""",
    each_node="""\
on_each_node() { within "$1" "${@:2}"; }
node_names() { uname -n; }""",
)
OVER_SSH = """\
# The same folder and arguments on each host; every line of output is preceded by the name of its host.
on_each_node() {
    within "$1" pdsh -R ssh -S -w "{host_list}" "cd $(printf %q "$PWD"); $(printf '%q ' "${@:2}")"
}
node_names() { echo {hosts}; }"""
"""Functions `each_node` for the hosts of a hostfile."""
SCHEDULERS = {"none": NONE, "slurm": SLURM, "pbs": PBS}
