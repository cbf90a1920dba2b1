"""Settings of a conversion: the TOML file given with `hydrazero convert --config`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.readers.frames import FieldNames, ReadSettings, SourceUnits
from hydrazero.shards.settings_parser import parse_settings
from hydrazero.shards.units import energy_factor, force_factor, length_factor, stress_factor

LABELS = ("energy", "forces", "stress")
GROUPS = ("geometry", "composition", "file")


@dataclass(frozen=True, kw_only=True)
class LabelSection:
    """Which labels a frame must have."""

    require: tuple[str, ...] = ("energy", "forces")


@dataclass(frozen=True, kw_only=True)
class SplitSection:
    """How frames are divided: by a hash of a group key, so that frames of one group stay together."""

    group: str = "geometry"
    """'geometry' (each frame on its own), 'composition', 'file', or 'info:KEY' for a field of the frame."""
    train: float = 0.8
    val: float = 0.1
    test: float = 0.1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Everything that a conversion can be told."""

    format: str | None = None
    """Name of a reader; guessed from each file's suffix if not set."""
    float_dtype: str = "float32"
    """'float32' or 'float64': precision of positions, forces and stress in the shards; energies are always float64."""
    duplicates: str = "keep"
    """'keep' or 'drop' frames whose geometry has come before."""
    fields: FieldNames = field(default_factory=FieldNames)
    units: SourceUnits = field(default_factory=SourceUnits)
    labels: LabelSection = field(default_factory=LabelSection)
    split: SplitSection = field(default_factory=SplitSection)
    select: dict[str, Any] = field(default_factory=dict)
    """Field of a frame -> values of it that are wanted; other frames are left out and counted."""
    source: dict[str, Any] = field(default_factory=dict)
    """Free text for the manifest: method, basis, code, citation, licence."""

    def read_settings(self) -> ReadSettings:
        """Return what readers need of it."""
        return ReadSettings(format=self.format, fields=self.fields, units=self.units, require=self.labels.require)


def load_convert_settings(path: Path | None, format_name: str | None = None) -> ConvertSettings:
    """Read a settings file (or take the defaults); `format_name` wins over the file's. Raises ConfigError."""
    table: dict[str, Any] = {}
    where = "convert settings:" if path is None else f"{path}:"
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"settings file {path} cannot be read ({error.strerror}).") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"settings file {path} is not valid TOML: {error}.") from error
    if format_name is not None:
        table["format"] = format_name
    settings = parse_settings(ConvertSettings, table, where)
    _check(settings, where)
    return settings


def _check(settings: ConvertSettings, where: str) -> None:
    choices = {
        "float_dtype": (settings.float_dtype, ("float32", "float64")),
        "duplicates": (settings.duplicates, ("keep", "drop")),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{where} {key} '{value}' is not known{did_you_mean(value, list(known))}.")
    for label in settings.labels.require:
        if label not in LABELS:
            raise ConfigError(f"{where} labels.require: '{label}' is no label{did_you_mean(label, list(LABELS))}.")
    if "energy" not in settings.labels.require:
        raise ConfigError(f"{where} labels.require must hold 'energy': every task is fitted on energies.")
    split = settings.split
    if split.group not in GROUPS and not split.group.startswith("info:"):
        known_groups = [*GROUPS, "info:KEY"]
        raise ConfigError(f"{where} split.group '{split.group}' is not known{did_you_mean(split.group, known_groups)}.")
    shares = (split.train, split.val, split.test)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9 or split.train == 0:
        raise ConfigError(f"{where} split.train, val and test are {shares}; they must add up to 1 with train above 0.")
    if split.seed < 0:
        raise ConfigError(f"{where} split.seed is {split.seed}; it must not be negative.")
    units = settings.units
    length_factor(units.length), energy_factor(units.energy), force_factor(units.forces), stress_factor(units.stress)
    for key, values in settings.select.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where} select.{key} must be a list of values, not {values!r}.")
