"""The space file of a search: the run file that all trials share, what is varied, and how long trials train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.files import read_toml
from hydrazero.shards.settings_parser import Section, parse_settings

Value = str | bool | int | float

WANTED_STRUCTURES = "batch.structures"
"""Key of the approximate number of structures in a batch, from which all of [batch] is worked out."""
OF_THE_BATCH = (WANTED_STRUCTURES, "model.cutoff", "data.temperature")
"""Keys on which a batch depends: if one of them is varied, each trial has its own [batch]."""


class SearchSection(Section):
    """The [search] section of a space file: what all trials have in common."""

    run: str
    """Run file that the trials share. A relative path counts from the folder in which the command is given."""
    out: str
    """Folder of the search, which holds the journal, the trials and the report. A relative path counts from the folder
    in which the command is given."""
    seconds: PositiveFloat
    """Seconds that a trial trains up to the last rung."""
    rungs: Annotated[int, Field(ge=1)] = 3
    """Number of rungs, which are the times at which trials are compared; trials end at the last one."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """One trial out of this number is promoted from a rung to the next, which lasts this number of times as long."""
    tries: Annotated[int, Field(ge=1)] = 1
    """Number of first trials for each choice of the lists: a sampler never returns to a choice whose only trial has
    failed."""
    ranks: Annotated[int, Field(ge=1)] = 1
    """Number of ranks of each trial."""
    rate: Literal["", "inference", "training"] = ""
    """Second objective, in structures/s: the speed of 'inference', that of 'training', or none if it is empty."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampler."""


class Range(Section):
    """Numbers from `low` to `high`, including both."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    step: NonNegativeFloat = 0.0
    """Distance between neighbouring values. At 0, all whole numbers of the range if the setting is a whole number, and
    all numbers of the range otherwise."""
    log: bool = False
    """Whether values are drawn evenly in their logarithm."""
    whole: bool = False
    """Whether all values are whole numbers, which follows from how the range is written; it is no key of a file."""

    @model_validator(mode="after")
    def _check_numbers(self) -> Range:
        low, high, step = self.low, self.high, self.step
        if low > high:
            raise ValueError(f"low is {low:g}, which is above high, {high:g}.")
        if low == high:
            raise ValueError(f"low and high are both {low:g}; put the value into the run file instead.")
        if self.log and low <= 0:
            raise ValueError(f"low is {low:g}, which has no logarithm; with log = true it must be above 0.")
        if self.log and step:
            raise ValueError(f"step is {step:g}, which log = true excludes; leave one of them out.")
        steps = (high - low) / step if step else 1.0
        if abs(steps - round(steps)) > 1e-6 or steps < 1:
            raise ValueError(f"step is {step:g}, with which values from low = {low:g} do not come to high = {high:g}.")
        return self

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that are checked before the search."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def suggest(self, trial: Any, key: str) -> Value:
        """Return the value that a trial of Optuna chooses; it keeps its choice."""
        chosen: Value
        if self.whole:
            chosen = trial.suggest_int(key, int(self.low), int(self.high), step=int(self.step) or 1, log=self.log)
        else:
            chosen = trial.suggest_float(key, self.low, self.high, step=self.step or None, log=self.log)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A list of values without an order."""

    values: tuple[Value, ...]
    """The values."""

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that are checked before the search."""
        return self.values

    def suggest(self, trial: Any, key: str) -> Value:
        """Return the value that a trial of Optuna chooses; it keeps its choice."""
        chosen: Value = trial.suggest_categorical(key, list(self.values))
        return chosen


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """A complete space file."""

    path: Path
    search: SearchSection
    vary: dict[str, Range | Choices]
    """What is varied, by the keys of the run file."""

    @property
    def out(self) -> Path:
        """Folder of the search."""
        return Path(self.search.out)

    @property
    def rungs(self) -> tuple[float, ...]:
        """Seconds of training at each rung, counted from the start of the trial."""
        section = self.search
        return tuple(section.seconds / section.reduction**left for left in reversed(range(section.rungs)))

    def document(self) -> dict[str, Any]:
        """Return what must stay the same while a search continues, as plain types."""
        vary = {key: list(p.values) if isinstance(p, Choices) else p.model_dump() for key, p in self.vary.items()}
        return {"search": self.search.model_dump(), "vary": vary}


def space_of(document: dict[str, Any], path: Path) -> SearchSpace:
    """Return the space that the document of a journal describes."""
    vary: dict[str, Range | Choices] = {
        key: Range(**each) if isinstance(each, dict) else Choices(values=tuple(each))
        for key, each in document["vary"].items()
    }
    return SearchSpace(path=path, search=SearchSection(**document["search"]), vary=vary)


def require_optuna() -> Any:
    """Import Optuna without its messages; raise ConfigError that says what to install if it is absent."""
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise ConfigError("hydrazero search needs the package optuna: pip install 'hydrazero[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def read_space(path: Path) -> SearchSpace:
    """Read a space file; raise ConfigError that names file and key. `check_space` checks the values."""
    table = read_toml(path, "space file")
    for key in table:
        if key not in ("search", "vary"):
            raise ConfigError(f"{path}: {key} is not known{did_you_mean(key, ['search', 'vary'])}.")
    for key in ("search", "vary"):
        if not isinstance(table.get(key), dict) or not table[key]:
            raise ConfigError(f"{path}: [{key}] is missing or empty.")
    section = parse_settings(SearchSection, table["search"], f"{path}: search")
    vary = {key: _parameter(each, f"{path}: vary, '{key}'") for key, each in _flat(table["vary"]).items()}
    return SearchSpace(path=path, search=section, vary=vary)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a table by dotted keys, however it is written; a table that holds numbers is a range."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value and all(isinstance(each, dict | list) for each in value.values()):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _parameter(value: Any, where: str) -> Range | Choices:
    if isinstance(value, dict):
        return _range(value, where)
    if not isinstance(value, list):
        raise ConfigError(f"{where} is {value!r}; give a list of values, or a range as {{low = 1, high = 2}}.")
    if not value:
        raise ConfigError(f"{where} is an empty list; name the values to choose from.")
    for each in value:
        if not isinstance(each, Value) or (isinstance(each, float) and not math.isfinite(each)):
            raise ConfigError(f"{where} has the value {each!r}; a choice is a text, a number, true or false.")
        if sum(type(each) is type(other) and each == other for other in value) > 1:
            raise ConfigError(f"{where} names {each!r} twice.")
    return Choices(values=tuple(value))


def _range(table: dict[str, Any], where: str) -> Range:
    if "whole" in table:
        raise ConfigError(f"{where}.whole is not known{did_you_mean('whole', ['low', 'high', 'step', 'log'])}.")
    if table.get("step") == 0:
        raise ConfigError(f"{where}.step is {table['step']:g}; it must be above 0.")
    whole = all(isinstance(each, int) for key, each in table.items() if key != "log")
    return parse_settings(Range, {**table, "whole": whole}, where)
