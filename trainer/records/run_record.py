"""The file `run.json`: the settings and the environment of a run, and every time that it was resumed.

Its tables of the run file, and the DeepSpeed JSON in it, are those with which the run was started or resumed last; each
entry under 'resumes' lists the settings that it changed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import write_json
from hydrazero.shards.location import location_in_run_file
from hydrazero.shards.manifest import manifest_sha256
from hydrazero.trainer.config.setting_change import SettingChange
from hydrazero.trainer.records.identity import RUN_ID, new_run_id
from hydrazero.trainer.records.run_files import RUN_NAME, read_run_json

VERSIONED_PACKAGES = ("hydrazero", "torch", "deepspeed", "torch_geometric", "webdataset", "numpy", "ase", "vesin")
OF_LAUNCHERS = ("--local_rank", "--launched-by", "--used-hours")
"""Options that launchers add to the command; users do not write them."""


def run_record(settings: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Return the content of `run.json` at the start: settings, versions, data, commit, command.

    `settings` are the tables of the run file, with the complete DeepSpeed JSON as 'deepspeed'.
    """
    versions = {}
    for name in VERSIONED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    manifests = {task["name"]: manifest_sha256(location_in_run_file(task["shards"])) for task in settings["tasks"]}
    facts = {"versions": versions, "manifests": manifests}
    return {**settings, **facts, **_start(ranks), RUN_ID: new_run_id(), "resumes": []}


def _start(ranks: int) -> dict[str, Any]:
    # With one rank, this process is the command `hydrazero train` or `hydrazero finetune` itself.
    words = sys.argv[1:] if sys.argv[1:2] != ["train"] else sys.argv[2:]
    command = [] if words[:1] == ["finetune"] else ["train"]
    return {
        "command": " ".join(["hydrazero", *command, *(word for word in words if not word.startswith(OF_LAUNCHERS))]),
        "ranks": ranks,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_commit(),
    }


def git_commit() -> dict[str, Any] | None:
    """Return the commit of the work tree that this process was started in, and whether tracked files differ from it.

    None outside a work tree, or without git.
    """
    found = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        found.append(done.stdout.strip())
    return {"commit": found[0], "changed": bool(found[1])}


def read_record(run_dir: Path) -> dict[str, Any]:
    """Return the content of `run.json`; raise ConfigError if it is missing, damaged, or not written by a run."""
    record = read_run_json(run_dir, RUN_NAME)
    if not isinstance(record, dict) or not isinstance(record.get("ranks"), int):
        raise ConfigError(f"{run_dir / RUN_NAME} does not say how many ranks the run has; start a new run.")
    return record


def add_resume(
    run_dir: Path, settings: Mapping[str, Any], changes: Sequence[SettingChange], *, step: int, ranks: int
) -> None:
    """Add to `run.json` that the run continues from `step` with `settings`, which differ by `changes` from before.

    `settings` are the tables of the run file, with the complete DeepSpeed JSON as 'deepspeed'.
    """
    record = read_record(run_dir)
    resumed = {"step": step, "steps": settings["train"]["steps"], "changes": [asdict(change) for change in changes]}
    resumes = [*record.get("resumes", []), {**resumed, **_start(ranks)}]
    write_json(run_dir / RUN_NAME, {**record, **settings, "resumes": resumes})


def lasting_changes(record: Mapping[str, Any]) -> list[tuple[int, list[SettingChange]]]:
    """Return the changes of settings by the step at which they took effect.

    A resume from an earlier step undoes those of the steps that it does again.
    """
    resumes = record.get("resumes", [])
    lasting = [
        resume for n, resume in enumerate(resumes) if all(later["step"] > resume["step"] for later in resumes[n + 1 :])
    ]
    found = [(resume["step"], [SettingChange(**each) for each in resume.get("changes", [])]) for resume in lasting]
    return [(step, changes) for step, changes in found if changes]
