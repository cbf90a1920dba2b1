"""From a request to a script, and to the scheduler."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from hydrazero.launch.job.job import Job
from hydrazero.launch.job.schedulers import SCHEDULERS
from hydrazero.launch.job.script import SCRIPT_NAME, job_script
from hydrazero.launch.job.site_file import Site
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import replacing
from hydrazero.trainer.records.run_files import writing


def check_scheduler(site: Site) -> None:
    """Raise ConfigError if a site's scheduler is not at hand here, or too old for what the script asks of it."""
    scheduler = SCHEDULERS[site.scheduler]
    for command in (scheduler.submit, scheduler.version):
        if command and shutil.which(command[0]) is None:
            raise ConfigError(
                f"--submit needs {command[0]}, which is not on the path; submit the script where jobs of site "
                f"{site.name} are submitted, or leave out --submit."
            )
    if not site.job.oldest:
        return
    said = subprocess.run(scheduler.version, capture_output=True, text=True)
    found = re.search(r"\d+(\.\d+)+", said.stdout)
    shown = " ".join(scheduler.version)
    if said.returncode != 0 or found is None:
        reason = (said.stderr.strip() or said.stdout.strip()).splitlines()[-1:] or [f"exit status {said.returncode}"]
        raise ConfigError(f"'{shown}' does not tell a version ({reason[0].rstrip('.')}); is the scheduler set up here?")
    if _numbers(found[0]) < _numbers(site.job.oldest):
        raise ConfigError(
            f"'{shown}' tells version {found[0]}, and jobs of site {site.name} need {site.job.oldest} "
            "at least; submit where there is a newer one."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def write_script(job: Job) -> Path:
    """Write a job's script to the run's folder, in one piece; returns its path."""
    text, path = job_script(job), job.launch_dir / SCRIPT_NAME

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
            part.chmod(0o755)

    writing(job.run_dir, write)
    return path


def submit(site: Site, script: Path) -> str:
    """Hand a script to the site's scheduler; returns the job's number. Raises ConfigError if it is refused."""
    done = subprocess.run([*SCHEDULERS[site.scheduler].submit, str(script)], capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise ConfigError(f"the scheduler refuses {script}: {said.rstrip('.')}; the script stays there, to be mended.")
    return done.stdout.strip().split(";")[0]
