"""Check a space file against its run file before anything starts: keys, types, and every single value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ConfigError, HydrazeroError, did_you_mean
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.search.space import OF_THE_BATCH, WANTED_STRUCTURES, Choices, Range, SearchSpace, read_space
from hydrazero.trainer.search.trial_settings import SET_BY_SEARCH, WARM_UP, trial_overrides

TARGET_WEIGHTS = "loss.target_weights."
"""Prefix of settings whose names come from the data."""


@dataclass(frozen=True, kw_only=True)
class CheckedSpace:
    """A space whose values have been checked, with the run file."""

    space: SearchSpace
    text: str
    """Content of the run file that trials share."""


def check_space(path: Path) -> CheckedSpace:
    """Read and check a space file; raise ConfigError with one sentence that names file and key."""
    space = read_space(path)
    try:
        base = load_run_config(space.search.run)
        text = Path(space.search.run).read_text(encoding="utf-8")
        known = {key: value for key, value in _settings(base.model_dump()).items() if not key.startswith("deepspeed.")}
        ds_config = deepspeed_config(base.deepspeed, base.train.steps)
        known |= _settings(ds_config, "deepspeed.") | {"deepspeed.config": "", WARM_UP: 1}
    except HydrazeroError as error:
        raise ConfigError(f"{path}: search.run: {error}") from error
    for key in space.vary:
        _check_key(key, known, str(path))
    vary = {key: _typed(parameter, known.get(key, 1.0)) for key, parameter in space.vary.items()}
    space = replace(space, vary=vary)
    if WANTED_STRUCTURES not in vary and (found := [key for key in OF_THE_BATCH if key in vary]):
        raise ConfigError(
            f"{path}: vary, '{found[0]}' changes what a batch holds, so [batch] must be worked out for each trial: say "
            f'for how many structures, as "{WANTED_STRUCTURES}" = [16].'
        )
    _check_values(space)
    return CheckedSpace(space=space, text=text)


def _settings(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return all single settings of nested tables by dotted keys."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            found |= _settings(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _check_key(key: str, known: dict[str, Any], where: str) -> None:
    for owned, reason in SET_BY_SEARCH.items():
        if key != WARM_UP and (key == owned or key.startswith(f"{owned}.")):
            raise ConfigError(f"{where}: vary, '{key}' cannot be varied: {reason}.")
    if key in known or key.startswith(TARGET_WEIGHTS):
        return
    hint = did_you_mean(key, list(known))
    hint = hint if hint.startswith(" (did") else ""  # else a list of everything
    if key.startswith("deepspeed."):
        raise ConfigError(
            f"{where}: vary, '{key}' is not in the DeepSpeed configuration{hint}; where it belongs there, give it a "
            "value in the run file, then it can be varied."
        )
    raise ConfigError(f"{where}: vary, '{key}' is no setting of a run file{hint}.")


def _typed(parameter: Range | Choices, present: Any) -> Range | Choices:
    """Return a range of whole numbers as a range of all numbers if the setting is not a whole number."""
    if isinstance(parameter, Range) and isinstance(present, float) and not parameter.step:
        return parameter.model_copy(update={"whole": False})
    return parameter


def _check_values(space: SearchSpace) -> None:
    """Check every value of a list and both ends of a range; keys on which batches depend have their first value."""
    from hydrazero.trainer.setup import check_settings

    def check(values: dict[str, Any], where: str) -> None:
        try:
            check_settings(load_run_config(space.search.run, trial_overrides(space.search.run, values)))
        except HydrazeroError as error:
            raise ConfigError(f"{space.path}: {where}: {error}") from error

    plain = {key: parameter.ends[0] for key, parameter in space.vary.items() if key in OF_THE_BATCH}
    check(plain, "vary" if plain else "search.run")
    for key, parameter in space.vary.items():
        for value in parameter.ends:
            check({**plain, key: value}, f"vary, '{key}'")
