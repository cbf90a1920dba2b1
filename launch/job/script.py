"""The script of a job, which a scheduler runs and which users can read, change and submit by hand."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path

from hydrazero.launch.job.job import Job
from hydrazero.launch.job.schedulers import OVER_SSH, SCHEDULERS
from hydrazero.launch.job.site_texts import SiteTexts
from hydrazero.launch.node.records import SIGNALS_NAME
from hydrazero.shards.text.foreign_text import escaped

SCRIPT_NAME = "job.sh"
RESPONSE_SECONDS = 120.0
"""Additional seconds within which a node must start and respond; if its work hangs, it reports that itself earlier."""
CLEAN_WITHIN = 120.0
"""Seconds within which nodes remove files from their disks, so that a lost node does not block the others."""
WAIT_FOR_RANKS, WAIT_IF_CANCELLED = 60, 10
"""Seconds for which the post-mortem waits for ranks that are still running after their launcher has ended."""
KILL_AFTER = 30
"""Seconds between SIGTERM and SIGKILL for a command that takes too long."""


def job_script(job: Job) -> str:
    """Return the script; raise ConfigError if a text of the site file has an unknown placeholder."""
    texts = SiteTexts(job)
    blocks = [
        _head(job, texts),
        _setup(job, texts),
        _variables(job, texts),
        _signals(job),
        _attempt(job),
        _nodes(job, texts),
        _copies(job),
        _ranks(job, texts),
        _judge(job, texts),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def comment(text: str) -> str:
    """Return a text as comment lines of the shell."""
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False))


def _head(job: Job, texts: SiteTexts) -> str:
    scheduler = SCHEDULERS[job.site.scheduler]
    script = job.launch_dir / SCRIPT_NAME
    ranks, nodes = _counted(job.ranks_per_node, "rank"), _counted(job.nodes, "node")
    return "\n".join(
        [
            scheduler.shell,
            *(f"{scheduler.prefix} {line}" for line in texts.directives() if scheduler.prefix),
            "#",
            comment(f"Trains {job.run_file} on {nodes} of {job.site.name} with {ranks} on each. Written by"),
            f"#     {escaped(job.command)}",
            "# and started with",
            f"#     {scheduler.submit[0]} {shlex.quote(str(script))}",
        ]
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _setup(job: Job, texts: SiteTexts) -> str:
    python = Path(sys.executable)
    lines = [
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *texts.setup(),
        "set -uo pipefail",
        comment("The Python environment that wrote this script and in which hydrazero is installed."),
        f"python={shlex.quote(str(python))}",
        'bin=$(dirname "$python")',
        comment("It comes last in the path, so that srun and mpiexec are those of the cluster."),
        'PATH="$PATH:$bin"',
        f"run_file={shlex.quote(str(job.run_file.absolute()))}",
        f"run={shlex.quote(str(job.run_dir))}",
        f"launch={shlex.quote(str(job.launch_dir))}",
        f"resume={'--resume' if job.resume else ''}",
        "restarted=${HYDRAZERO_RESUME:-}",
        SCHEDULERS[job.site.scheduler].job,
        comment("A job that has been started before continues from the last checkpoint, if the run has begun."),
        'if [ -n "$restarted" ] && [ -e "$run/run.json" ]; then resume=--resume; fi',
    ]
    return "\n".join(lines)


def _variables(job: Job, texts: SiteTexts) -> str:
    blocks = []
    for variable in job.site.variables:
        value = texts.variable(variable)
        if value is not None:
            blocks.append(f"{comment(variable.reason)}\n{variable.name}={value}\nexport {variable.name}")
    return "\n".join(blocks)


def _signals(job: Job) -> str:
    text = "SIGTERM is sent when the job is cancelled or preempted: the ranks write a checkpoint and stop."
    if SCHEDULERS[job.site.scheduler].signals:
        text = (
            f"SIGUSR1 is sent {job.site.job.stop_before:g} s before the time limit of the job, SIGTERM when the job is "
            "cancelled or preempted. In both cases the ranks write a checkpoint and stop; if they have not started, "
            "the job stops at once. After SIGTERM, the job is not restarted."
        )
    return f"""\
{comment(text)}
received=
attempt=
command=
ranks=
# shellcheck disable=SC2317  # called by the traps
receive() {{
    received="$received $1"
    if [ -d "$attempt" ]; then echo "$received" > "$attempt/{SIGNALS_NAME}"; fi
    if [ -n "$command" ]; then kill "$command" 2> /dev/null; fi
    if [ -n "$ranks" ]; then signal_ranks "$1"; fi
}}
signal_ranks() {{ kill -s {SCHEDULERS[job.site.scheduler].forwarded} {_target(job)} 2> /dev/null; }}
trap 'receive USR1' USR1
trap 'receive TERM' TERM INT
# Runs a command for at most a number of seconds: `within SECONDS COMMAND...`. The command runs in the background,
# because a shell handles signals only after a foreground command has ended.
within() {{
    local before=$received status
    timeout --kill-after={KILL_AFTER} "$@" &
    command=$!
    if [ "$received" != "$before" ]; then kill "$command" 2> /dev/null; fi
    while :; do
        wait "$command"
        status=$?
        kill -0 "$command" 2> /dev/null || break
    done
    command=
    return "$status"
}}"""


def _target(job: Job) -> str:
    """Return the process or process group to which signals for the ranks are sent."""
    return '-- "-$ranks"' if SCHEDULERS[job.site.scheduler].own_group else '"$ranks"'


def _attempt(job: Job) -> str:
    each_node = SCHEDULERS[job.site.scheduler].each_node.replace("{nodes}", str(job.nodes))
    if job.hosts:
        each_node = OVER_SSH.replace("{hosts}", " ".join(job.hosts)).replace("{host_list}", ",".join(job.hosts))
    return f"""\
{each_node}

# Folder for the records that nodes and ranks of this attempt leave. The attempt before is judged now, in case it was
# killed before that could be done.
shopt -s nullglob
earlier=("$launch"/attempt-*)
if [ "${{#earlier[@]}}" -gt 0 ]; then "$bin/hydrazero" postmortem "$run"; fi
attempt=$launch/attempt-$(printf %04d $((${{#earlier[@]}} + 1)))
mkdir -p "$attempt" || exit 1
if [ -n "$received" ]; then echo "$received" > "$attempt/{SIGNALS_NAME}"; fi
printf '{{"job": "%s"}}\\n' "$job" > "$attempt/job.json\""""


def _nodes(job: Job, texts: SiteTexts) -> str:
    section = job.site.job
    words = [f"--within {section.check_within:g}"]
    if job.gpus_per_node:
        words.append(f"--devices {job.gpus_per_node}")
    words += [f"--folder {folder}" for folder in texts.node_folders()]
    copies = ""
    if job.staged():
        copies = f'copies="{job.site.files.node_local}/hydrazero-$job"\n'
        words.append(f'--copies "$copies" --room {job.staged_bytes()}')
    if section.health:
        words.append(texts.command("health"))
    return f"""\
# Does a task on all nodes before the ranks start: `all_nodes TASK SECONDS COMMAND...`. Nodes that fail report it
# themselves, nodes that have not responded are named here; in both cases no rank starts.
ready=yes
all_nodes() {{
    if [ -z "$ready" ] || [ -n "$received" ] || on_each_node "$2" "${{@:3}}"; then return; fi
    ready=
    if [ -n "$received" ]; then return; fi
    node_names | "$python" -m hydrazero.launch.node.silent_nodes --attempt "$attempt" --part "$1" --within "$2"
}}
{copies}all_nodes check {section.check_within + RESPONSE_SECONDS:g} \\
    "$python" -m hydrazero.launch.node.check --attempt "$attempt" {_continued(words)}"""


def _continued(words: list[str]) -> str:
    """Return the words of a command on lines of their own."""
    return " \\\n    ".join(words)


def _copies(job: Job) -> str:
    if not job.staged():
        return ""
    words = [f"--within {job.site.job.copy_within:g}", '--to "$copies"']
    words += [f"--task {shlex.quote(task)} {shlex.quote(str(folder))}" for task, folder in job.staged().items()]
    return f"""\
# The shards are copied to the disk of every node once, so that ranks do not read the shared file system in each epoch.
all_nodes copy {job.site.job.copy_within + RESPONSE_SECONDS:g} \\
    "$python" -m hydrazero.launch.node.copy_shards --attempt "$attempt" {_continued(words)}"""


def _node_folders(job: Job, texts: SiteTexts) -> list[str]:
    """Return the folders on the nodes' own disks during the job, quoted for the shell."""
    return [*texts.node_folders(), *(['"$copies"'] if job.staged() else [])]


def _ranks(job: Job, texts: SiteTexts) -> str:
    section, scheduler = job.site.job, SCHEDULERS[job.site.scheduler]
    launcher = texts.command("launcher")
    options = ['--attempt "$attempt"']
    if job.hours and not scheduler.signals:
        options.append(f"--stop-after $(({round(3600 * job.hours - section.stop_before)} - SECONDS))")
    if section.one_device:
        options.append("--one-device")
    options += [f"--remove {folder}" for folder in _node_folders(job, texts)]
    words = ['"$run_file"', "$resume", *(f"--set {shlex.quote(each)}" for each in job.overrides)]
    if job.staged():
        words.append('--set data.copies="$copies"')
    master = scheduler.master.replace("{first_host}", job.hosts[0] if job.hosts else "127.0.0.1")
    carry = ""
    if job.hosts:
        names = " ".join(variable.name for variable in job.site.variables)
        carry = f"""
    # Variables for the other hosts, since the deepspeed launcher passes on only a few.
    for name in {names} $(compgen -e | grep -E '^(GLOO|NCCL|RCCL|FI|UCX|OMP|DS)_'); do
        case "${{!name-}}" in *$'\\n'*) ;; *) printf '%s=%s\\n' "$name" "${{!name-}}" ;; esac
    done | sort -u > "$attempt/environment"
    export DS_ENV_FILE=$attempt/environment"""
    group = alone = pause = ""
    if scheduler.own_group:  # the launcher may end before its ranks do
        group, alone = (
            "\n    # The launcher and its ranks get a process group of their own.\n    set -m",
            "\n    set +m",
        )
        pause = "sleep 0.2; "
    return f"""\
# Ranks find each other at this address and port; the launcher passes each rank its number.
{master}
export MASTER_ADDR=$first MASTER_PORT=$port
if [ -n "$ready" ] && [ -z "$received" ]; then{carry}{group}
    # shellcheck disable=SC2086  # $resume is one word or empty
    {launcher} \\
        {" ".join(options)} \\
        "$python" -u -m hydrazero.trainer.train {" ".join(words)} &
    ranks=$!{alone}
    # Signals that came before the ranks had started.
    for each in $received; do signal_ranks "$each"; done
    # The loop is needed because a signal interrupts `wait`.
    while kill -0 {_target(job)} 2> /dev/null; do {pause}wait "$ranks" 2> /dev/null; done
fi"""


def _judge(job: Job, texts: SiteTexts) -> str:
    section = job.site.job
    folders = _node_folders(job, texts)
    clean = f"""
# Without messages: a scheduler may start nothing more for a cancelled job; its nodes have then cleaned up themselves.
on_each_node {CLEAN_WITHIN:g} rm -rf {" ".join(folders)} 2> /dev/null"""
    restart = ""
    if section.requeue:
        requeue = texts.command("requeue")
        restart = f"""
if [ "$verdict" -eq 75 ] && [[ $received != *TERM* ]] && {requeue}; then
    echo "job $job is put back into the queue"
    exit 0
fi"""
    return f"""\
# Reports which rank failed first and why, or how far the run has come; the status is 75 if the job should be restarted.
# Ranks on other nodes may still be writing a checkpoint after the launcher has ended; a cancelled job has little time.
wait={WAIT_FOR_RANKS}
if [[ $received == *TERM* ]]; then wait={WAIT_IF_CANCELLED}; fi
"$bin/hydrazero" postmortem "$run" --retries {section.retries} --wait "$wait"
verdict=$?{clean if folders else ""}{restart}
exit "$verdict\""""
