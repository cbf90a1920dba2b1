"""The DeepSpeed configuration of a run: a packaged JSON or one of the user, with the overrides of the run file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.files import read_json
from hydrazero.trainer.config.precision import KEYS, precision_of
from hydrazero.trainer.config.schedule_shapes import own_shape

TABLES = ("optimizer", "scheduler", "zero_optimization", *KEYS)
ADAM = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "bias_correction"),
    *("torch_adam", "adam_w_mode", "set_grad_none", "fp32_optimizer_states", "adamw_mode"),
    *("foreach", "fused", "maximize", "capturable", "differentiable"),
)
"""Parameters of Adam and AdamW in DeepSpeed, on GPUs and CPUs, and in PyTorch."""
RATE_NAMES = ("learning_rate", "learningrate", "rate")
"""Names of the learning rate elsewhere."""
WARMUP_SHARE = 5
"""The warm-up of a packaged schedule takes at most the steps of the run divided by this number."""


def deepspeed_config(section: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON that the run file's [deepspeed] section describes, for a run of some number of steps.

    Raises ConfigError for a configuration that does not exist, or cannot be used.
    """
    changes = copy.deepcopy(dict(section))
    name = changes.pop("config", "zero1")
    if not isinstance(name, str):
        raise ConfigError(f"deepspeed.config must be a name or a path, not {name!r}.")
    document, packaged = _read(name)
    where = f"DeepSpeed configuration '{name}':"
    for key in ("optimizer", "scheduler"):
        change = changes.get(key)
        if isinstance(change, dict) and "type" in change and change["type"] != document.get(key, {}).get("type"):
            document.pop(key, None)  # its parameters belong to another type
    document = _merged(document, changes)
    _check_tables(document, where)
    if document.get("train_micro_batch_size_per_gpu", 1) != 1:
        raise ConfigError(
            f"{where} train_micro_batch_size_per_gpu must be 1, since a micro-batch is one packed batch; set "
            "its size by [batch] in the run file."
        )
    try:
        precision_of(document)
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from error
    if not document.get("optimizer", {}).get("type"):
        raise ConfigError(f"{where} optimizer.type is missing; name an optimizer such as AdamW.")
    _check_optimizer(document["optimizer"])
    clip = document.get("gradient_clipping", 0.0)
    if not _is_number(clip) or not clip >= 0:
        raise ConfigError(f"{where} gradient_clipping is {clip!r}; it must be a number of at least 0.")
    if "scheduler" in document:
        if document["scheduler"].get("type") == "WarmupStableDecayLR":
            document["scheduler"].setdefault("params", {}).setdefault("total_num_steps", "auto")
        by_user = not packaged or "warmup_num_steps" in changes.get("scheduler", {}).get("params", {})
        _fill_in_steps(document["scheduler"].get("params", {}), steps, by_user, where)
        try:
            own_shape(document)
        except ConfigError as error:
            raise ConfigError(f"{where} {error}") from error
    return document


def _read(name: str) -> tuple[dict[str, Any], bool]:
    """Return the content of a packaged configuration or of a file, and whether it is a packaged one."""
    folder = resources.files("hydrazero.ds_configs")
    known = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
    packaged = name in known
    source: Any = folder / f"{name}.json" if packaged else Path(name)
    if not source.is_file():
        hint = did_you_mean(name, known)
        raise ConfigError(
            f"deepspeed.config '{name}' is neither a file nor the name of a packaged configuration{hint}."
        )
    document = read_json(source, "DeepSpeed configuration")
    if not isinstance(document, dict):
        raise ConfigError(f"DeepSpeed configuration {source} holds no object of settings, {{...}}.")
    return document, packaged


def _check_tables(document: dict[str, Any], where: str) -> None:
    places = [(key, document) for key in TABLES]
    places += [("params", document[key]) for key in ("optimizer", "scheduler") if isinstance(document.get(key), dict)]
    for key, table in places:
        if not isinstance(table.get(key, {}), dict):
            raise ConfigError(f"{where} {key} is {json.dumps(table[key])}; it must be an object, {{...}}, or left out.")


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    """Raise ConfigError for a parameter that Adam and AdamW do not have, or one of another type."""
    params, place = optimizer.get("params", {}), "deepspeed.optimizer.params"
    for key in params if str(optimizer["type"]).lower() in ("adam", "adamw") else ():
        if key not in ADAM:
            hint = " (did you mean 'lr'?)" if key in RATE_NAMES else did_you_mean(key, list(ADAM))
            raise ConfigError(f"{place}.{key} is not known{hint}.")
    for key in ("lr", "eps", "weight_decay"):
        if key in params and not _is_number(params[key]):
            raise ConfigError(f"{place}.{key} must be a number, not {json.dumps(params[key])}.")
    betas = params.get("betas", [0.9, 0.999])
    if not isinstance(betas, list | tuple) or not all(map(_is_number, betas)):
        raise ConfigError(f"{place}.betas must be a list of numbers, not {json.dumps(betas)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fill_in_steps(params: dict[str, Any], steps: int, by_user: bool, where: str) -> None:
    """Replace "auto" by the steps of the run; shorten a packaged warm-up in a short run, but not one of the user."""
    warmup = params.get("warmup_num_steps", 0)
    if not _is_number(warmup):
        raise ConfigError(f"{where} scheduler.params.warmup_num_steps is {warmup!r}; it must be a whole number.")
    if not by_user and "warmup_num_steps" in params:
        warmup = params["warmup_num_steps"] = min(warmup, max(steps // WARMUP_SHARE, 1))
    if warmup >= steps and by_user:
        raise ConfigError(
            f"{where} scheduler.params.warmup_num_steps is {warmup}, but the run has {steps} steps; set it below them."
        )
    if params.get("total_num_steps") == "auto":
        # Steps count from 1: a cosine ends at the last step, and a linear decay reaches 0 one step later.
        params["total_num_steps"] = steps + 1


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
