"""The space file of a search: the run file that all trials share, what is varied, and how long trials train."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.settings_parser import parse_settings

Value = str | bool | int | float

RATES = ("", "inference", "training")

WANTED_STRUCTURES = "batch.structures"
"""Of a trial: about so many structures a batch, from which the whole of [batch] is worked out."""
OF_THE_BATCH = (WANTED_STRUCTURES, "model.cutoff", "data.temperature")
"""What a batch depends on: where one of these is varied, each trial has a [batch] of its own."""


@dataclass(frozen=True, kw_only=True)
class SearchSection:
    """What is common to all trials."""

    run: str
    """Run file that the trials share."""
    out: str
    """Folder of the search: journal, trials, report; relative, as `run`, to the folder where the command is given."""
    seconds: float
    """Of training at the top rung."""
    rungs: int = 3
    """Halts at which trials are compared; at the last one they are finished."""
    reduction: int = 3
    """One trial in so many goes on from a rung, to so many times the seconds."""
    tries: int = 1
    """First trials for each choice of the lists: a sampler leaves alone what has failed it once."""
    ranks: int = 1
    """Of each trial."""
    rate: str = ""
    """Second objective, in structures/s: 'inference', 'training', or none."""
    seed: int = 0
    """Of the sampler."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both among them."""

    low: float
    high: float
    step: float = 0.0
    """Between neighbouring values; 0: whole numbers where the setting is one, else any number."""
    log: bool = False
    """Whether values are drawn evenly in their logarithm."""
    whole: bool = False
    """Whether all of them are whole numbers."""

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values to check."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def suggest(self, trial: Any, key: str) -> Value:
        """Let a trial of Optuna choose; what it has chosen once it keeps."""
        chosen: Value
        if self.whole:
            chosen = trial.suggest_int(key, int(self.low), int(self.high), step=int(self.step) or 1, log=self.log)
        else:
            chosen = trial.suggest_float(key, self.low, self.high, step=self.step or None, log=self.log)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A list of values, which have no order."""

    values: tuple[Value, ...]

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values to check."""
        return self.values

    def suggest(self, trial: Any, key: str) -> Value:
        """Let a trial of Optuna choose; what it has chosen once it keeps."""
        chosen: Value = trial.suggest_categorical(key, list(self.values))
        return chosen


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """A whole space file."""

    path: Path
    search: SearchSection
    vary: dict[str, Range | Choices]
    """By the keys of the run file."""

    @property
    def out(self) -> Path:
        """Folder of the search."""
        return Path(self.search.out)

    @property
    def rungs(self) -> tuple[float, ...]:
        """Seconds of training at each rung, all rungs before it among them."""
        section = self.search
        return tuple(section.seconds / section.reduction**left for left in reversed(range(section.rungs)))

    def document(self) -> dict[str, Any]:
        """Return what must stay the same while a search goes on, as JSON has it."""
        vary = {key: list(p.values) if isinstance(p, Choices) else asdict(p) for key, p in self.vary.items()}
        return {"search": asdict(self.search), "vary": vary}


def space_of(document: dict[str, Any], path: Path) -> SearchSpace:
    """Return the space that a document is of, which lies in a journal."""
    vary: dict[str, Range | Choices] = {
        key: Range(**each) if isinstance(each, dict) else Choices(values=tuple(each))
        for key, each in document["vary"].items()
    }
    return SearchSpace(path=path, search=SearchSection(**document["search"]), vary=vary)


def require_optuna() -> Any:
    """Import Optuna, quietly; raises ConfigError that says what to install if it is not there."""
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise ConfigError("hydrazero search needs the package optuna: pip install 'hydrazero[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def read_space(path: Path) -> SearchSpace:
    """Read a space file; raises ConfigError naming file and key. Values are checked by `check_space`."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"space file {path} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"space file {path} is not valid TOML: {error}.") from error
    for key in table:
        if key not in ("search", "vary"):
            raise ConfigError(f"{path}: {key} is not known{did_you_mean(key, ['search', 'vary'])}.")
    for key in ("search", "vary"):
        if not isinstance(table.get(key), dict) or not table[key]:
            raise ConfigError(f"{path}: [{key}] is missing or empty.")
    section = parse_settings(SearchSection, table["search"], f"{path}: search")
    _check_section(section, f"{path}: search")
    vary = {key: _parameter(each, f"{path}: vary, '{key}'") for key, each in _flat(table["vary"]).items()}
    return SearchSpace(path=path, search=section, vary=vary)


def _check_section(section: SearchSection, where: str) -> None:
    if not 0 < section.seconds < math.inf:
        raise ConfigError(f"{where}.seconds is {section.seconds}; it must be a number above 0.")
    for key, least in (("rungs", 1), ("reduction", 2), ("tries", 1), ("ranks", 1), ("seed", 0)):
        if getattr(section, key) < least:
            raise ConfigError(f"{where}.{key} is {getattr(section, key)}; it must be at least {least}.")
    if section.rate not in RATES:
        raise ConfigError(f"{where}.rate '{section.rate}' is not known{did_you_mean(section.rate, list(RATES[1:]))}.")


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a table by dotted keys, however it was written; a table with a key of ranges is a range."""
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
    found = parse_settings(Range, table, where)
    if not all(map(math.isfinite, (found.low, found.high, found.step))):
        raise ConfigError(f"{where}: low, high and step must be finite numbers.")
    if found.low > found.high:
        raise ConfigError(f"{where}: low = {found.low:g} is above high = {found.high:g}.")
    if found.low == found.high:
        raise ConfigError(f"{where}: the range is empty, low and high are both {found.low:g}; put it in the run file.")
    if found.log and found.low <= 0:
        raise ConfigError(f"{where}: low = {found.low:g} has no logarithm; with log = true it must be above 0.")
    if found.log and found.step:
        raise ConfigError(f"{where}: log = true and step = {found.step:g} exclude each other.")
    if found.step < 0 or (found.step == 0 and "step" in table):
        raise ConfigError(f"{where}: step = {found.step:g}; it must be above 0.")
    steps = (found.high - found.low) / found.step if found.step else 1.0
    if abs(steps - round(steps)) > 1e-6 or steps < 1:
        raise ConfigError(
            f"{where}: steps of {found.step:g} from low = {found.low:g} do not come to high = {found.high:g}."
        )
    whole = all(isinstance(each, int) for key, each in table.items() if key != "log")
    return Range(low=found.low, high=found.high, step=found.step, log=found.log, whole=whole)
