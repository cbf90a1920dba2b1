"""Settings of a conversion: the TOML file given with `hydrazero convert --config`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydrazero.shards.convert.presets import load_preset
from hydrazero.shards.errors import ConfigError, SourceError, did_you_mean
from hydrazero.shards.readers.frames import ASE_STRESS_ORDER, FieldNames, ReadSettings, SourceUnits, stress_places
from hydrazero.shards.settings_parser import parse_settings
from hydrazero.shards.targets import TargetSection, check_targets
from hydrazero.shards.units import energy_factor, force_factor, length_factor, stress_factor

LABELS = ("energy", "forces", "stress", "charge", "multiplicity")
GROUPS = ("geometry", "composition", "file")


@dataclass(frozen=True, kw_only=True)
class LabelSection:
    """Which labels a frame must have."""

    require: tuple[str, ...] = ("energy", "forces")
    absent_if_zero: tuple[str, ...] = ()
    """Of 'forces' and 'stress': those that the source fills with zeros where it has none."""


@dataclass(frozen=True, kw_only=True)
class SplitSection:
    """How frames are divided: by a hash of a group key, so that frames of one group stay together."""

    group: str = "geometry"
    """'geometry' (each frame on its own), 'composition', 'file', or 'info:KEY' for a field of the frame."""
    train: float = 0.8
    val: float = 0.1
    test: float = 0.1
    seed: int = 0
    val_files: tuple[str, ...] = ()
    """Patterns of paths of sources, such as "*/test.json", whose frames all go to the validation split, or (next) to
    the test split; the shares above are for the others."""
    test_files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Everything that a conversion can be told."""

    format: str | None = None
    """Name of a reader; guessed from each file's suffix if not set."""
    float_dtype: str = "float32"
    """'float32' or 'float64': precision of positions, forces and stress in the shards; energies are always float64."""
    duplicates: str = "keep"
    """'keep' or 'drop' frames whose geometry has come before."""
    degree_cutoffs: tuple[float, ...] = (4.0, 5.0, 6.0)
    """Å; within each of these, neighbours are counted for the manifest, for the size of batches. The largest costs."""
    energy_per_atom: bool = False
    """Whether the source's energies are divided by the number of atoms."""
    stress_order: str = ASE_STRESS_ORDER
    """Order of six numbers of a stress or virial; VASP's is "xx yy zz xy yz xz"."""
    fields: FieldNames = field(default_factory=FieldNames)
    columns: dict[str, Any] = field(default_factory=dict)
    """Part of a structure -> its dataset in HDF5, or its key in LMDB: numbers, positions, cell, pbc, labels, ptr or
    n_atoms for ragged arrays; any further name becomes a field of the frame."""
    units: SourceUnits = field(default_factory=SourceUnits)
    labels: LabelSection = field(default_factory=LabelSection)
    targets: dict[str, TargetSection] = field(default_factory=dict)
    """Name -> further quantity to take over from the source."""
    split: SplitSection = field(default_factory=SplitSection)
    select: dict[str, Any] = field(default_factory=dict)
    """Field of a frame -> values of it that are wanted; other frames are left out and counted."""
    source: dict[str, Any] = field(default_factory=dict)
    """Free text for the manifest: method, basis, code, citation, licence."""

    def read_settings(self, *, trust_pickle: bool = False) -> ReadSettings:
        """Return what readers need of it; whether pickles may be loaded comes from the user, never from a file."""
        return ReadSettings(
            format=self.format,
            fields=self.fields,
            units=self.units,
            columns=self.columns,
            require=self.labels.require,
            targets=self.targets,
            absent_if_zero=self.labels.absent_if_zero,
            energy_per_atom=self.energy_per_atom,
            stress_order=self.stress_order,
            trust_pickle=trust_pickle,
        )


def load_convert_settings(
    path: Path | None, format_name: str | None = None, *, preset: str | None = None
) -> ConvertSettings:
    """Read a settings file (or take the defaults), on top of a preset's values if one is named.

    `format_name` wins over both. Raises ConfigError.
    """
    where = "convert settings:" if path is None else f"{path}:"
    table: dict[str, Any] = {} if preset is None else dict(load_preset(preset).table)
    if path is not None:
        table = _merged(table, _read_table(path))
    if format_name is not None:
        table["format"] = format_name
    settings = parse_settings(ConvertSettings, table, where)
    _check(settings, where)
    return settings


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path} is not valid TOML: {error}.") from error


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values of the changes over those of the base, table by table."""
    both = {**base, **changes}
    for key in base.keys() & changes.keys():
        if isinstance(base[key], dict) and isinstance(changes[key], dict):
            both[key] = _merged(base[key], changes[key])
    return both


def _check(settings: ConvertSettings, where: str) -> None:
    choices = {
        "float_dtype": (settings.float_dtype, ("float32", "float64")),
        "duplicates": (settings.duplicates, ("keep", "drop")),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{where} {key} '{value}' is not known{did_you_mean(value, list(known))}.")
    check_targets(settings.targets, where)
    known_labels = [*LABELS, *settings.targets]
    for label in settings.labels.require:
        if label not in known_labels:
            raise ConfigError(f"{where} labels.require: '{label}' is no label{did_you_mean(label, known_labels)}.")
    if "energy" not in settings.labels.require and not settings.targets:
        raise ConfigError(f"{where} labels.require must hold 'energy', unless there are [targets] to learn.")
    split = settings.split
    if split.group not in GROUPS and not split.group.startswith("info:"):
        known_groups = [*GROUPS, "info:KEY"]
        raise ConfigError(f"{where} split.group '{split.group}' is not known{did_you_mean(split.group, known_groups)}.")
    shares = (split.train, split.val, split.test)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9 or split.train == 0:
        raise ConfigError(f"{where} split.train, val and test are {shares}; they must add up to 1 with train above 0.")
    if split.seed < 0:
        raise ConfigError(f"{where} split.seed is {split.seed}; it must not be negative.")
    for key, values in settings.select.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where} select.{key} must be a list of values, not {values!r}.")
    _check_reading(settings, where)


def _check_reading(settings: ConvertSettings, where: str) -> None:
    units = settings.units
    length_factor(units.length), energy_factor(units.energy), force_factor(units.forces), stress_factor(units.stress)
    try:
        stress_places(settings.stress_order)
    except SourceError as error:
        raise ConfigError(f"{where} {error}") from error
    for label in settings.labels.absent_if_zero:
        if label not in ("forces", "stress"):
            raise ConfigError(f"{where} labels.absent_if_zero: '{label}' is neither 'forces' nor 'stress'.")
    for key, name in settings.columns.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where} columns.{key} must be the name of a dataset, not {name!r}.")
