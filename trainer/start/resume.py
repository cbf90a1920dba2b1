"""Checks before a run is resumed: its folder, its settings, its shards, and its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydrazero.models.atomistic import model_from_facts
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.manifest import manifest_sha256
from hydrazero.trainer.checkpoint.folders import checkpoints, step_of
from hydrazero.trainer.config.resume_rules import changed_settings, check_changes, flat_settings
from hydrazero.trainer.config.sections import TaskSection
from hydrazero.trainer.config.setting_change import SettingChange, shown_value
from hydrazero.trainer.records.run_files import MODEL_FACTS_NAME, RUN_NAME, read_run_json
from hydrazero.trainer.records.run_record import read_record

OF_RUN_FILE = ("forces", "stress", "charge_spin", "targets")
"""Facts of a task that the run file can set; the others come from its shards."""


def check_run_folder(run_dir: Path, resume: bool) -> None:
    """Raise ConfigError if there is no run to resume, or if there is one where a new run is to start."""
    is_there = (run_dir / RUN_NAME).exists()
    if resume and not is_there:
        raise ConfigError(f"run folder {run_dir} holds no run to resume; leave out --resume, or set run.out.")
    if is_there and not resume:
        raise ConfigError(
            f"run folder {run_dir} holds a run already; use --resume to continue it, remove the folder, or set run.out."
        )


def check_resume(run_dir: Path, settings: Mapping[str, Any], tasks: Sequence[TaskSection], *, shards: bool) -> None:
    """Raise ConfigError if a run cannot be resumed with `settings` (all of them, by key), or with other shards.

    Its shards are compared only if `shards` is set.
    """
    record = read_record(run_dir)
    check_changes(changed_settings(recorded_settings(record, str(run_dir / RUN_NAME)), settings), f"run {run_dir}")
    steps, done = settings["train.steps"], [step_of(folder) for folder in checkpoints(run_dir)]
    if done and done[-1] > steps:
        raise ConfigError(
            f"train.steps is {steps}, but run {run_dir} has a checkpoint of step {done[-1]} already; set train.steps "
            f"to at least {done[-1]}, in the run file or by --set train.steps={done[-1]} if it was set so before."
        )
    known = record.get("manifests", {}) if shards else {}
    for task in tasks:
        if known.get(task.name, "") and manifest_sha256(task.location) != known[task.name]:
            raise ConfigError(
                f"task '{task.name}': {task.shards} holds other shards than those that run {run_dir} was started with "
                "(the manifest has another checksum); resume with the same ones, or start a new run."
            )


def changes_since(run_dir: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> list[SettingChange]:
    """Return how `settings` differ from those with which a checkpoint was written; `state` is what it holds.

    Checkpoints of earlier versions hold no settings, and have those with which their run was started.
    """
    before = state.get("settings") or settings_at_start(read_record(run_dir), str(run_dir / RUN_NAME))
    return changed_settings(before, settings)


def recorded_settings(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings in the content of `run.json` by key; raise ConfigError if it has another form."""
    try:
        return flat_settings(record)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{where} does not hold the settings of a run; start a new run.") from error


def settings_at_start(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings with which a run was started, before any resume changed them."""
    settings = recorded_settings(record, where)
    for resume in reversed(record.get("resumes", [])):
        for change in resume.get("changes", []):
            settings[change["key"]] = change["old"]
    return {key: value for key, value in settings.items() if value is not None or not key.startswith("deepspeed.")}


def check_same_model(run_dir: Path, described: dict[str, Any]) -> None:
    """Raise ConfigError, with a key that differs, unless the run file still describes the model of the run.

    `described` holds the facts of the model of the run file.
    """
    known = model_from_facts(read_run_json(run_dir, MODEL_FACTS_NAME)).facts()  # that of an older run has fewer fields
    before, now = (json.loads(json.dumps(facts)) for facts in (known, described))
    if before == now:
        return
    start_new = "or start a new run (remove the folder, or set run.out)"
    names, names_now = ([task["name"] for task in facts["tasks"]] for facts in (before, now))
    if names != names_now:
        raise ConfigError(
            f"{run_dir} was started with the tasks {', '.join(names)}, and the run file has {', '.join(names_now)}; "
            f"resume with the same ones, {start_new}."
        )
    for key, old, new in _differences(_model_keys(before["settings"]), _model_keys(now["settings"])):
        raise ConfigError(
            f"{run_dir} was started with {key} = {shown_value(old)}, and the run file has {shown_value(new)}; set the "
            f"same to resume it, {start_new}."
        )
    for one, other in zip(before["tasks"], now["tasks"], strict=True):
        for key, old, new in _differences(one, other):
            if key in OF_RUN_FILE:
                old, new = (sorted(value) if key == "targets" else value for value in (old, new))
                raise ConfigError(
                    f"{run_dir} was started with {key} = {shown_value(old)} for task '{one['name']}', and now they "
                    f"would be {shown_value(new)}; set the same to resume it, {start_new}."
                )
            raise ConfigError(
                f"{run_dir} was started with other shards of task '{one['name']}' ({key} differs); resume with the "
                f"same ones, {start_new}."
            )
    raise ConfigError(f"{run_dir} was started with another model than the run file names now; {start_new[3:]}.")


def _model_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model by their keys in a run file."""
    own = {key: value for key, value in settings.items() if key != "encoder"}
    return {f"model.{key}": value for key, value in (settings["encoder"] | own).items()}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return key, old and new value of the entries that differ, those that a run file can set first."""
    keys = sorted(before.keys() | now.keys(), key=lambda key: (key not in OF_RUN_FILE, key))
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
