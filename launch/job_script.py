"""The script of a job: what a scheduler reads and runs, and what a person can read, change and run by hand."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from pathlib import Path

from hydrazero.launch.job import Job
from hydrazero.launch.schedulers import OVER_SSH, SCHEDULERS
from hydrazero.shards.errors import ConfigError, did_you_mean

PLACE = re.compile(r"(?<!\$)\{(\w+)\}")
"""Of a text in a site file; with a dollar before it, it is the shell's."""
MAY_BE_EMPTY = ("hosts",)
"""Places of which a text may have nothing."""
SCRIPT_NAME = "job.sh"


def job_script(job: Job) -> str:
    """Return the script; raises ConfigError for a text of the site file with a place that is not known."""
    values = places(job)
    blocks = [
        _head(job, values),
        _setup(job, values),
        _variables(job, values),
        _signals(job),
        _attempt(job),
        _nodes(job, values),
        _stage(job, values),
        _ranks(job, values),
        _judge(job, values),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


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


def _all_filled(job: Job, key: str, values: dict[str, str]) -> list[str]:
    where = f"site {job.site.name}: job.{key}"
    lines = (filled(text, values, f"{where}[{n}]") for n, text in enumerate(getattr(job.site.job, key)))
    return [line for line in lines if line is not None]


def comment(text: str) -> str:
    """Return a text as lines of comments."""
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False))


def _head(job: Job, values: dict[str, str]) -> str:
    scheduler = SCHEDULERS[job.site.scheduler]
    script = job.launch_dir / SCRIPT_NAME
    ranks, nodes = _counted(job.ranks_per_node, "rank"), _counted(job.nodes, "node")
    return "\n".join(
        [
            scheduler.shell,
            *(f"{scheduler.prefix} {line}" for line in _all_filled(job, "directives", values) if scheduler.prefix),
            "#",
            comment(f"Trains {job.run_file} on {nodes} of {job.site.name} with {ranks} on each. Written by"),
            f"#     {job.command}",
            "# and started with",
            f"#     {scheduler.submit[0]} {shlex.quote(str(script))}",
        ]
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _setup(job: Job, values: dict[str, str]) -> str:
    python = Path(sys.executable)
    lines = [
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *_all_filled(job, "setup", values),
        "set -uo pipefail",
        comment("The Python that wrote this script, and with it hydrazero."),
        f"python={shlex.quote(str(python))}",
        'PATH="$(dirname "$python"):$PATH"',
        f"run_file={shlex.quote(str(job.run_file.absolute()))}",
        f"run={shlex.quote(str(job.run_dir))}",
        f"launch={shlex.quote(str(job.launch_dir))}",
        f"resume=${{HYDRAZERO_RESUME:-{'--resume' if job.resume else ''}}}",
        SCHEDULERS[job.site.scheduler].job,
    ]
    return "\n".join(lines)


def _variables(job: Job, values: dict[str, str]) -> str:
    blocks = []
    for variable in job.site.variables:
        value = filled(variable.value, values, f"site {job.site.name}: variable {variable.name}")
        if value is not None:
            blocks.append(f'{comment(variable.reason)}\n{variable.name}="{value}"\nexport {variable.name}')
    return "\n".join(blocks)


def _signals(job: Job) -> str:
    text = "SIGTERM comes when the job is cancelled or has to make way: the ranks stop with a checkpoint."
    if SCHEDULERS[job.site.scheduler].signals:
        text = (
            f"SIGUSR1 comes {job.site.job.stop_before:g} s before the job's time is over, SIGTERM when it is cancelled "
            "or has to make way: either way the ranks stop with a checkpoint."
        )
    target = _target(job)
    return f"""\
{comment(text)}
told=
ranks=
# shellcheck disable=SC2317  # the traps call it
tell() {{
    told=$1
    if [ -n "$ranks" ]; then kill -s "$1" {target}; fi
}}
trap 'tell USR1' USR1
trap 'tell TERM' TERM INT"""


def _target(job: Job) -> str:
    """What signals for the ranks go to."""
    return '-- "-$ranks"' if SCHEDULERS[job.site.scheduler].own_group else '"$ranks"'


def _attempt(job: Job) -> str:
    each_node = SCHEDULERS[job.site.scheduler].each_node.replace("{nodes}", str(job.nodes))
    if job.hosts:
        each_node = OVER_SSH.replace("{host_list}", ",".join(job.hosts))
    return f"""\
{each_node}

# A folder for what nodes and ranks of this try leave behind. The one before is judged now, should it have been killed
# before it could be.
shopt -s nullglob
earlier=("$launch"/attempt-*)
if [ "${{#earlier[@]}}" -gt 0 ]; then hydrazero postmortem "$run"; fi
attempt=$launch/attempt-$(printf %04d $((${{#earlier[@]}} + 1)))
mkdir -p "$attempt" || exit 1
printf '{{"job": "%s"}}\\n' "$job" > "$attempt/job.json\""""


def _nodes(job: Job, values: dict[str, str]) -> str:
    lines = [comment("Nodes that are not fit are named, and no rank starts.")]
    check = 'on_each_node "$python" -m hydrazero.launch.node_check --attempt "$attempt"'
    if job.gpus_per_node:
        check += f" --devices {job.gpus_per_node}"
    folders = [f'"{folder}"' for folder in _all_filled(job, "node_folders", values)]
    if job.staged():
        lines.append(f'copies="{job.site.files.node_local}/hydrazero-$job"')
        folders += [f'"$copies"/{shlex.quote(task)}' for task in job.staged()]
        check += f" --room {job.staged_bytes()}"
    check += "".join(f" \\\n    --folder {folder}" for folder in folders)
    lines += ["fit=yes", f"{check} || fit="]
    if job.site.job.health:
        health = filled(job.site.job.health, values, f"site {job.site.name}: job.health")
        lines.append(f'if [ -n "$fit" ]; then on_each_node {health} || fit=; fi')
    return "\n".join(lines)


def _stage(job: Job, values: dict[str, str]) -> str:
    if not job.staged():
        return ""
    where = f"site {job.site.name}: job.stage"
    command = filled(job.site.job.stage, {**values, "source": '"$file"', "target": '"$copies/$1/${file##*/}"'}, where)
    calls = [f"stage {shlex.quote(task)} {shlex.quote(str(folder))}" for task, folder in job.staged().items()]
    return f"""\
# Shards go to every node's own disk once, instead of every rank's reading them from the shared one in each epoch.
stage() {{
    local file
    for file in "$2"/*; do
        if [ -n "$fit" ]; then {command} || fit=; fi
    done
}}
{chr(10).join(calls)}"""


def _ranks(job: Job, values: dict[str, str]) -> str:
    section, scheduler = job.site.job, SCHEDULERS[job.site.scheduler]
    launcher = filled(section.launcher, values, f"site {job.site.name}: job.launcher")
    options = ['--attempt "$attempt"']
    if job.hours and not scheduler.signals:
        options.append(f"--stop-after $(({round(3600 * job.hours - section.stop_before)} - SECONDS))")
    if section.one_device:
        options.append("--one-device")
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
    group, pause = "", ""
    if scheduler.own_group:  # the launcher may end before its ranks have
        group, pause = "\n    # A group of processes for the launcher and its ranks.\n    set -m", "sleep 0.2; "
    return f"""\
# Where ranks meet; each is told its number by the launcher.
{meet}
export MASTER_ADDR=$first MASTER_PORT=$port
if [ -n "$fit" ] && [ -z "$told" ]; then{carry}{group}
    # shellcheck disable=SC2086  # $resume is one word or none
    {launcher} {" ".join(options)} \\
        "$python" -u -m hydrazero.trainer.train {" ".join(words)} &
    ranks=$!
    # A signal ends a wait before the ranks have ended.
    while kill -0 {_target(job)} 2> /dev/null; do {pause}wait "$ranks"; done
fi"""


def _judge(job: Job, values: dict[str, str]) -> str:
    section = job.site.job
    folders = [f'"{folder}"' for folder in _all_filled(job, "node_folders", values)]
    folders += ['"$copies"'] if job.staged() else []
    clean = f"\non_each_node rm -rf {' '.join(folders)}" if folders else ""
    again = ""
    if section.requeue:
        requeue = filled(section.requeue, values, f"site {job.site.name}: job.requeue")
        again = f"""
if [ "$verdict" -eq 75 ] && {requeue}; then
    echo "job $job goes back into the queue"
    exit 0
fi"""
    return f"""\
# Which rank failed first and why, or how far the run has come; 75 if it should go on.
hydrazero postmortem "$run" --retries {section.retries}
verdict=$?{clean}{again}
exit "$verdict\""""
