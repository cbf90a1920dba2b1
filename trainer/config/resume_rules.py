"""What a changed setting does when a run is resumed: one rule for each key of the run file and the DeepSpeed JSON.

Keys are written with dots: `train.steps`, `tasks.NAME.weight`, `deepspeed.optimizer.params.lr`. The table in
docs/guide/resume.md shows the same rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

from hydrazero.shards.errors import ConfigError
from hydrazero.trainer.config.precision import KEYS
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.config.sections import TaskSection
from hydrazero.trainer.config.setting_change import SettingChange, shown_value

REFUSED, APPLIES, COMPARED, UNUSED = "is refused", "takes effect", "is compared", "changes nothing"
"""Outcomes of a change: the run is not resumed; the new value counts from the resumed step on; the model and the data
that the value describes must be the same; the value has no influence on a run that has started."""

BEST, PATIENCE, LOSSES, BALANCE = "best", "patience", "losses", "balance"
"""What starts anew after a change: the best validation loss; the count of evaluations without a lower one; the
statistics of training losses (intervals of the log, loss spikes); the weights of the balancing method."""

POSITION = "the run's position in its data depends on it"
START = "it sets the weights that a run starts with"
STATES = "the optimizer's state in the checkpoint depends on it"
MODEL = "the weights in the checkpoint depend on it"


@dataclass(frozen=True, kw_only=True)
class ResumeRule:
    """The rule for the keys that match one of some patterns."""

    keys: tuple[str, ...]
    """Patterns of keys, in which * stands for any text."""
    outcome: str
    """REFUSED, APPLIES, COMPARED or UNUSED."""
    why: str = ""
    """Reason why a change is refused, as part of a sentence."""
    anew: frozenset[str] = frozenset()
    """What starts anew: BEST, PATIENCE, LOSSES, BALANCE."""


RULES = (
    ResumeRule(keys=("run.seed", "data.temperature", "tasks", "tasks.*.share"), outcome=REFUSED, why=POSITION),
    ResumeRule(
        keys=("run.start_from", "tasks.*.init_head", "finetune.method", "finetune.rank", "finetune.layer_decay"),
        outcome=REFUSED,
        why=START,
    ),
    ResumeRule(
        keys=("tasks.*.shards", "tasks.*.forces", "tasks.*.stress", "tasks.*.charge_spin", "tasks.*.targets"),
        outcome=COMPARED,
    ),
    ResumeRule(keys=("model.size", "run.out", "data.copies", "finetune.check_units", "plan.*"), outcome=UNUSED),
    ResumeRule(keys=("model.*",), outcome=REFUSED, why=MODEL),
    ResumeRule(keys=("train.freeze",), outcome=REFUSED, why=STATES),
    ResumeRule(keys=("loss.change_from", "loss.change_until"), outcome=APPLIES),
    ResumeRule(keys=("loss.*",), outcome=APPLIES, anew=frozenset({BEST, PATIENCE, LOSSES, BALANCE})),
    ResumeRule(keys=("tasks.*.weight",), outcome=APPLIES, anew=frozenset({BEST, PATIENCE, LOSSES})),
    ResumeRule(keys=("data.on_bad_shard",), outcome=APPLIES, anew=frozenset({BEST, PATIENCE})),
    ResumeRule(keys=("train.evaluate_every",), outcome=APPLIES, anew=frozenset({PATIENCE})),
    ResumeRule(keys=("balance.method",), outcome=APPLIES, anew=frozenset({LOSSES, BALANCE})),
    ResumeRule(
        keys=(
            "run.wandb",
            "data.workers",
            "batch.*",
            "balance.*",
            "train.*",
        ),
        outcome=APPLIES,
    ),
    ResumeRule(
        keys=tuple(f"deepspeed.optimizer.params.{key}" for key in ("lr", "weight_decay", "betas", "eps", "momentum")),
        outcome=APPLIES,
    ),
    ResumeRule(keys=("deepspeed.optimizer.params.torch_adam",), outcome=APPLIES),
    ResumeRule(keys=("deepspeed.optimizer.*", "deepspeed.scheduler.type"), outcome=REFUSED, why=STATES),
    ResumeRule(keys=("deepspeed.fp16.enabled",), outcome=APPLIES),
    ResumeRule(
        keys=("deepspeed.fp16.*",), outcome=REFUSED, why="the scale of the loss in the checkpoint depends on it"
    ),
    # The engine is built from the new JSON, and a checkpoint holds nothing of these.
    ResumeRule(keys=("deepspeed.*",), outcome=APPLIES),
)
"""The rules; the first one with a matching pattern counts."""


def rule_of(key: str) -> ResumeRule:
    """Return the rule for a key; raise ConfigError for one of another version of hydrazero, which has none."""
    for rule in RULES:
        if any(fnmatchcase(key, pattern) for pattern in rule.keys):
            return rule
    raise ConfigError(
        f"the run has the setting '{key}', which this version of hydrazero does not know; resume it with the version "
        "that wrote it (versions in its run.json)."
    )


def flat_settings(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings by their keys with dots, from the tables of a run file, or of the `run.json` made of them.

    `tables["deepspeed"]` is the complete DeepSpeed JSON. Tables that are not of the run file are left out.
    """
    document = json.loads(json.dumps({name: tables[name] for name in RunConfig.model_fields if name in tables}))
    flat = _flat(document.pop("deepspeed", {}), "deepspeed")
    tasks = document.pop("tasks", [])
    flat["tasks"] = [task["name"] for task in tasks]
    for task in tasks:
        flat |= {f"tasks.{task['name']}.{key}": value for key, value in task.items() if key != "name"}
    return flat | {f"{name}.{key}": value for name, table in document.items() for key, value in table.items()}


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}.{name}") if isinstance(value, Mapping) else {f"{prefix}.{name}": value}
    return found


def default_settings(tasks: Sequence[str]) -> dict[str, Any]:
    """Return the values of all keys that have a default; older versions had fewer keys, and did what these say."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    tables = {
        name: _defaults(section)
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, BaseModel)
    }
    # Models of older versions may differ from the present defaults; model.json knows how they were.
    del tables["model"]
    return flat_settings({**tables, "tasks": [{"name": name, **_defaults(TaskSection)} for name in tasks]})


def _defaults(section: type[BaseModel]) -> dict[str, Any]:
    return {
        key: field.get_default(call_default_factory=True)
        for key, field in section.model_fields.items()
        if not field.is_required()
    }


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[SettingChange]:
    """Return the settings that differ, sorted by key, from the results of `flat_settings`."""
    before = {**default_settings(before.get("tasks", [])), **before}
    if "tasks" not in before:
        before = {**before, "tasks": now["tasks"]}
    unknown = {key for key in now if key.startswith("model.") and key not in before}
    keys = (before.keys() | now.keys()) - unknown - _of_other_precisions(before, now)
    return [
        SettingChange(key=key, old=before.get(key), new=now.get(key))
        for key in sorted(keys)
        if before.get(key) != now.get(key)
    ]


def _of_other_precisions(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Return the keys of precisions that are not enabled both before and now, except `enabled` itself."""
    found = set()
    for name in KEYS:
        switch = f"deepspeed.{name}.enabled"
        if not (before.get(switch) and now.get(switch)):
            found |= {key for key in (*before, *now) if key.startswith(f"deepspeed.{name}.")}
            if bool(before.get(switch)) != bool(now.get(switch)):
                found.discard(switch)
    return found


def check_changes(changes: Sequence[SettingChange], where: str) -> None:
    """Raise ConfigError if a change is refused; `where` is the run folder."""
    for change in changes:
        rule = rule_of(change.key)
        if rule.outcome == REFUSED:
            raise ConfigError(
                f"{where} cannot be resumed with another {change.key}: it was {shown_value(change.old)} and is now "
                f"{shown_value(change.new)}, and {rule.why}; set it as before, or start a new run (run.start_from "
                "takes over the weights)."
            )


def starts_anew(changes: Sequence[SettingChange]) -> frozenset[str]:
    """Return what starts anew after some changes: BEST, PATIENCE, LOSSES, BALANCE."""
    return frozenset(name for change in changes for name in rule_of(change.key).anew)


def sentences_on(changes: Sequence[SettingChange], state: Mapping[str, Any]) -> list[str]:
    """Return sentences for the log about changes, and about what starts anew; `state` is that of the checkpoint."""
    if not changes:
        return []
    said = [f"settings changed at step {state['step']}: {', '.join(map(str, changes))}."]
    anew, best = starts_anew(changes), state.get("best")
    if BEST in anew and best is not None:
        said.append(
            f"the lowest validation loss so far, {best['loss']:.4g} at step {best['step']}, was measured with other "
            "settings: the best checkpoint and train.patience start anew."
        )
    if BALANCE in anew:
        said.append("balance.method starts as at the beginning of a run.")
    return said
