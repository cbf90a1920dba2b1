"""The run file, which describes a training run together with a DeepSpeed JSON.

Gradient accumulation, optimizer, learning-rate schedule, clipping, precision and ZeRO are set in the DeepSpeed JSON;
the run file names it and may override single values of it in its `[deepspeed]` table.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from hydrazero.models.encoders import ENCODERS, size_settings
from hydrazero.models.encoders.base import EncoderSettings
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import read_toml
from hydrazero.shards.graphs.graph import BatchShape
from hydrazero.shards.settings_parser import ListOf, Section, parse_settings
from hydrazero.trainer.balance import BalanceSection, check_balance
from hydrazero.trainer.config.finetune_section import FULL, FinetuneSection
from hydrazero.trainer.config.sections import (
    DataSection,
    LossSection,
    ModelSection,
    PlanSection,
    RunSection,
    TaskSection,
    TrainSection,
)


class RunConfig(Section):
    """A complete run file."""

    run: RunSection
    tasks: ListOf[TaskSection]
    train: TrainSection
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    batch: BatchShape = BatchShape(structures=32, atoms=1024, slots=16384)
    loss: LossSection = LossSection()
    balance: BalanceSection = BalanceSection()
    finetune: FinetuneSection = FinetuneSection()
    plan: PlanSection = PlanSection()
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"config": "zero1"})
    """The DeepSpeed configuration: `config` is the name of one that comes with hydrazero (zero1, zero2_bf16, ...) or
    the path of a JSON file, and every other key replaces a value of it."""

    @property
    def shares(self) -> tuple[float | None, ...]:
        """Fixed fractions of the tasks in batches; empty if no task has one."""
        shares = tuple(task.share for task in self.tasks)
        return () if all(share is None for share in shares) else shares

    @model_validator(mode="after")
    def _check_tasks(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("tasks is empty; a run needs at least one [[tasks]].")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"task '{name}' is named twice; give each task its own name.")
        if not any(task.weight for task in self.tasks):
            raise ValueError("every task has the weight 0; at least one weight must be above 0.")
        return self

    @model_validator(mode="after")
    def _check_encoder(self) -> RunConfig:
        _check_encoder_name(self.model.encoder)
        return self

    @model_validator(mode="after")
    def _check_balance(self) -> RunConfig:
        check_balance(self.balance)
        return self

    @model_validator(mode="after")
    def _check_shares(self) -> RunConfig:
        shares = [task.share for task in self.tasks if task.share is not None]
        total, all_have = sum(shares), len(shares) == len(self.tasks)
        if all_have and abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the tasks add up to {total:g}, not to 1; leave one of them out.")
        if shares and not all_have and total >= 1:
            raise ValueError(f"the shares of some tasks add up to {total:g} and leave nothing for the others.")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> RunConfig:
        """Reject settings that only make sense for a run that starts from another model."""
        if self.run.start_from:
            return self
        if self.finetune.method != FULL:
            raise ValueError(
                f"finetune.method = '{self.finetune.method}' needs a model to start from; set run.start_from."
            )
        for task in self.tasks:
            if task.init_head:
                raise ValueError(
                    f"task '{task.name}' has init_head = '{task.init_head}', but there is no model with heads; set "
                    "run.start_from."
                )
        return self


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply overrides of the form 'section.key=value'.

    Raises ConfigError that names the file and the key at fault.
    """
    path = Path(path)
    table = read_toml(path, "run file")
    for override in overrides:
        apply_override(table, override)
    _apply_size(table, f"{path}:")
    return parse_settings(RunConfig, table, f"{path}:")


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set a value in the tables of a run file by an override of the form 'section.key=value'.

    Raises ConfigError if the override does not have this form, or goes through a key that is no table.
    """
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {override} is not of the form section.key=value.")
    if len(names) == 1 and (places := _sections_with(names[0])):
        raise ConfigError(f"--set {override}: the key is in a section; did you mean {' or '.join(places)}?")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is taken as a text, so that --set run.out=runs/a needs no quotes
    for place, name in enumerate(names[:-1]):
        table = table.setdefault(name, {})
        if isinstance(table, list):
            raise ConfigError(f"--set {override}: [[{name}]] is a list of tables; change it in the run file.")
        if not isinstance(table, dict):
            raise ConfigError(
                f"--set {override}: '{name}' is a single value, without keys of its own; set it as "
                f"{'.'.join(names[: place + 1])}=VALUE."
            )
    table[names[-1]] = value


def _sections_with(key: str) -> list[str]:
    """Return where a key is if one or two sections have it, as 'section.key'; an empty list otherwise."""
    if key in RunConfig.model_fields:
        return []
    sections = ((name, field.annotation) for name, field in RunConfig.model_fields.items())
    places = [f"{name}.{key}" for name, kind in sections if key in getattr(kind, "model_fields", {})]
    return places if len(places) <= 2 else []


def _apply_size(table: dict[str, Any], where: str) -> None:
    """Fill in the settings that the size of the model stands for, except those that the run file sets."""
    model = table.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("size"), str):
        return
    encoder = model.get("encoder", EncoderSettings.model_fields["encoder"].default)
    if not isinstance(encoder, str):
        return
    try:
        _check_encoder_name(encoder)
        table["model"] = {**size_settings(encoder, model["size"]), **model}
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from error


def _check_encoder_name(name: str) -> None:
    """Raise ConfigError, with the key of the run file, if there is no encoder of this name."""
    try:
        ENCODERS.check(name)
    except ConfigError as error:
        raise ConfigError(f"model.encoder: {error}") from error
