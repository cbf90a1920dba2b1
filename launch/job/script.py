"""The script of a job: what a scheduler reads and runs, and what a person can read, change and run by hand."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path

from hydrazero.launch.job.job import Job
from hydrazero.launch.job.schedulers import OVER_SSH, SCHEDULERS
from hydrazero.launch.job.site_texts import SiteTexts
from hydrazero.launch.node.records import TOLD_NAME

SCRIPT_NAME = "job.sh"
TO_ANSWER = 120.0
"""Seconds that a node has to start and to answer, beside those for what it does: if that hangs, it says so itself."""
CLEAN_WITHIN = 120.0
"""Seconds in which nodes remove what is on their disks; one that is gone must not hold the others."""
WAIT_FOR_RANKS, WAIT_IF_CANCELLED = 60, 10
"""Seconds that the post-mortem waits for ranks which still live once their launcher has ended."""
KILL_AFTER = 30
"""Seconds between asking and killing what has no time left."""


def job_script(job: Job) -> str:
    """Return the script; raises ConfigError for a text of the site file with a place that is not known."""
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
    """Return a text as lines of comments."""
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
            *(f"#     {line}" for line in job.command.splitlines()),
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
        comment("The Python that wrote this script, and with it hydrazero."),
        f"python={shlex.quote(str(python))}",
        'bin=$(dirname "$python")',
        comment("At the end: srun and mpiexec are the cluster's, whatever else was installed along with hydrazero."),
        'PATH="$PATH:$bin"',
        f"run_file={shlex.quote(str(job.run_file.absolute()))}",
        f"run={shlex.quote(str(job.run_dir))}",
        f"launch={shlex.quote(str(job.launch_dir))}",
        f"resume={'--resume' if job.resume else ''}",
        "again=${HYDRAZERO_RESUME:-}",
        SCHEDULERS[job.site.scheduler].job,
        comment("A job that has been started before goes on from the run's last checkpoint, if it had begun."),
        'if [ -n "$again" ] && [ -e "$run/run.json" ]; then resume=--resume; fi',
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
    text = "SIGTERM comes when the job is cancelled or has to make way: the ranks stop with a checkpoint."
    if SCHEDULERS[job.site.scheduler].signals:
        text = (
            f"SIGUSR1 comes {job.site.job.stop_before:g} s before the job's time is over, SIGTERM when it is cancelled "
            "or has to make way: either way the ranks stop with a checkpoint, what comes before them stops at once. "
            "After a SIGTERM the job does not go on."
        )
    return f"""\
{comment(text)}
told=
attempt=
part=
ranks=
# shellcheck disable=SC2317  # the traps call it
tell() {{
    told="$told $1"
    if [ -d "$attempt" ]; then echo "$told" > "$attempt/{TOLD_NAME}"; fi
    if [ -n "$part" ]; then kill "$part" 2> /dev/null; fi
    if [ -n "$ranks" ]; then tell_ranks "$1"; fi
}}
tell_ranks() {{ kill -s {SCHEDULERS[job.site.scheduler].tells} {_target(job)} 2> /dev/null; }}
trap 'tell USR1' USR1
trap 'tell TERM' TERM INT
# Runs a command for so many seconds at most. It is in the background, since a shell puts signals off until the end of
# what it runs in the foreground.
within() {{
    local before=$told status
    timeout --kill-after={KILL_AFTER} "$@" &
    part=$!
    if [ "$told" != "$before" ]; then kill "$part" 2> /dev/null; fi
    while :; do
        wait "$part"
        status=$?
        kill -0 "$part" 2> /dev/null || break
    done
    part=
    return "$status"
}}"""


def _target(job: Job) -> str:
    """What signals for the ranks go to."""
    return '-- "-$ranks"' if SCHEDULERS[job.site.scheduler].own_group else '"$ranks"'


def _attempt(job: Job) -> str:
    each_node = SCHEDULERS[job.site.scheduler].each_node.replace("{nodes}", str(job.nodes))
    if job.hosts:
        each_node = OVER_SSH.replace("{hosts}", " ".join(job.hosts)).replace("{host_list}", ",".join(job.hosts))
    return f"""\
{each_node}

# A folder for what nodes and ranks of this try leave behind. The one before is judged now, should it have been killed
# before it could be.
shopt -s nullglob
earlier=("$launch"/attempt-*)
if [ "${{#earlier[@]}}" -gt 0 ]; then "$bin/hydrazero" postmortem "$run"; fi
attempt=$launch/attempt-$(printf %04d $((${{#earlier[@]}} + 1)))
mkdir -p "$attempt" || exit 1
if [ -n "$told" ]; then echo "$told" > "$attempt/{TOLD_NAME}"; fi
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
# Does something on all nodes before ranks start, within so many seconds. Nodes that are not fit name themselves, those
# that have not answered are named here, and no rank starts.
fit=yes
all_nodes() {{
    if [ -z "$fit" ] || [ -n "$told" ] || on_each_node "$2" "${{@:3}}"; then return; fi
    fit=
    if [ -n "$told" ]; then return; fi
    node_names | "$python" -m hydrazero.launch.node.silent_nodes --attempt "$attempt" --part "$1" --within "$2"
}}
{copies}all_nodes check {section.check_within + TO_ANSWER:g} \\
    "$python" -m hydrazero.launch.node.check --attempt "$attempt" {_continued(words)}"""


def _continued(words: list[str]) -> str:
    """Words of a command, a line each."""
    return " \\\n    ".join(words)


def _copies(job: Job) -> str:
    if not job.staged():
        return ""
    words = [f"--within {job.site.job.copy_within:g}", '--to "$copies"']
    words += [f"--task {shlex.quote(task)} {shlex.quote(str(folder))}" for task, folder in job.staged().items()]
    return f"""\
# Shards go to every node's own disk once, instead of every rank's reading them from the shared one in each epoch.
all_nodes copy {job.site.job.copy_within + TO_ANSWER:g} \\
    "$python" -m hydrazero.launch.node.copy_shards --attempt "$attempt" {_continued(words)}"""


def _node_folders(job: Job, texts: SiteTexts) -> list[str]:
    """What is on the nodes' own disks for the time of the job, as words of the shell."""
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
    meet = scheduler.meet.replace("{first_host}", job.hosts[0] if job.hosts else "127.0.0.1")
    carry = ""
    if job.hosts:
        names = " ".join(variable.name for variable in job.site.variables)
        carry = f"""
    # What goes to the other hosts, since the deepspeed launcher takes little along.
    for name in {names} $(compgen -e | grep -E '^(GLOO|NCCL|RCCL|FI|UCX|OMP|DS)_'); do
        printf '%s=%s\\n' "$name" "${{!name-}}"
    done | sort -u > "$attempt/environment"
    export DS_ENV_FILE=$attempt/environment"""
    group = alone = pause = ""
    if scheduler.own_group:  # the launcher may end before its ranks have
        group, alone = "\n    # A group of processes for the launcher and its ranks.\n    set -m", "\n    set +m"
        pause = "sleep 0.2; "
    return f"""\
# Where ranks meet; each is told its number by the launcher.
{meet}
export MASTER_ADDR=$first MASTER_PORT=$port
if [ -n "$fit" ] && [ -z "$told" ]; then{carry}{group}
    # shellcheck disable=SC2086  # $resume is one word or none
    {launcher} \\
        {" ".join(options)} \\
        "$python" -u -m hydrazero.trainer.train {" ".join(words)} &
    ranks=$!{alone}
    # What came before there was someone to tell.
    for each in $told; do tell_ranks "$each"; done
    # A signal ends a wait before the ranks have ended.
    while kill -0 {_target(job)} 2> /dev/null; do {pause}wait "$ranks" 2> /dev/null; done
fi"""


def _judge(job: Job, texts: SiteTexts) -> str:
    section = job.site.job
    folders = _node_folders(job, texts)
    clean = f"""
# Quietly: where a scheduler starts nothing more for a job that was cancelled, what ran on the nodes has cleaned up.
on_each_node {CLEAN_WITHIN:g} rm -rf {" ".join(folders)} 2> /dev/null"""
    again = ""
    if section.requeue:
        requeue = texts.command("requeue")
        again = f"""
if [ "$verdict" -eq 75 ] && [[ $told != *TERM* ]] && {requeue}; then
    echo "job $job goes back into the queue"
    exit 0
fi"""
    return f"""\
# Which rank failed first and why, or how far the run has come; 75 if it should go on. Ranks on other nodes may outlive
# the launcher by a checkpoint; what is left of a job that was cancelled is killed soon.
wait={WAIT_FOR_RANKS}
if [[ $told == *TERM* ]]; then wait={WAIT_IF_CANCELLED}; fi
"$bin/hydrazero" postmortem "$run" --retries {section.retries} --wait "$wait"
verdict=$?{clean if folders else ""}{again}
exit "$verdict\""""
