"""Writing a job's script, and submitting it to the scheduler."""

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
    """Raise ConfigError if the site's scheduler is not available here, or is too old for the script."""
    scheduler = SCHEDULERS[site.scheduler]
    for command in (scheduler.submit, scheduler.version):
        if command and shutil.which(command[0]) is None:
            raise ConfigError(
                f"--submit needs {command[0]}, which is not on the path; submit the script on a machine with the "
                f"scheduler of site {site.name}, or leave out --submit."
            )
    if not site.job.oldest:
        return
    said = subprocess.run(scheduler.version, capture_output=True, text=True)
    found = re.search(r"\d+(\.\d+)+", said.stdout)
    shown = " ".join(scheduler.version)
    if said.returncode != 0 or found is None:
        reason = (said.stderr.strip() or said.stdout.strip()).splitlines()[-1:] or [f"exit status {said.returncode}"]
        raise ConfigError(f"'{shown}' prints no version ({reason[0].rstrip('.')}); is the scheduler set up here?")
    if _numbers(found[0]) < _numbers(site.job.oldest):
        raise ConfigError(
            f"'{shown}' prints version {found[0]}, but jobs of site {site.name} need at least {site.job.oldest}; "
            "submit the script where a newer version is installed."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def write_script(job: Job) -> Path:
    """Write a job's script to the run folder, atomically, and return its path."""
    text, path = job_script(job), job.launch_dir / SCRIPT_NAME

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
            part.chmod(0o755)

    writing(job.run_dir, write)
    return path


def submit(site: Site, script: Path) -> str:
    """Submit a script to the site's scheduler and return the job's number; raise ConfigError if it is rejected."""
    done = subprocess.run([*SCHEDULERS[site.scheduler].submit, str(script)], capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise ConfigError(
            f"the scheduler rejects {script}: {said.rstrip('.')}; the script is kept and can be corrected."
        )
    return done.stdout.strip().split(";")[0]
