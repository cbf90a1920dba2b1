"""The conversion file, which `hydrazero convert --config` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, model_validator

from hydrazero.shards.convert.presets import load_preset
from hydrazero.shards.errors import did_you_mean
from hydrazero.shards.files import read_toml
from hydrazero.shards.readers.frames import ASE_STRESS_ORDER, FieldNames, ReadSettings, SourceUnits, stress_places
from hydrazero.shards.settings_parser import Fraction, ListOf, Name, Section, parse_settings
from hydrazero.shards.targets import TargetSection, check_target_name

LABELS = ("energy", "forces", "stress", "charge", "multiplicity")
GROUPS = ("geometry", "composition", "file")


class LabelSection(Section):
    """The labels that a frame must have."""

    require: ListOf[str] = ("energy", "forces")
    """Labels without which a frame is an error: 'energy', 'forces', 'stress', 'charge', 'multiplicity', or the name of
    a target."""
    absent_if_zero: ListOf[Literal["forces", "stress"]] = ()
    """Labels that count as absent where all their numbers are zero, since the source writes zeros where it has none:
    'forces', 'stress' or both."""


class SplitSection(Section):
    """The division of frames among the splits, by a hash of their group: frames of a group stay together."""

    group: str = "geometry"
    """What makes frames a group: 'geometry' (each frame is on its own), 'composition', 'file', or 'info:KEY' for the
    value of a field of the frame."""
    train: Fraction = 0.8
    """Fraction of the groups that are for training."""
    val: Fraction = 0.1
    """Fraction of the groups that are for validation."""
    test: Fraction = 0.1
    """Fraction of the groups that are for testing."""
    seed: NonNegativeInt = 0
    """Seed of the hash; another seed gives another division."""
    val_files: ListOf[str] = ()
    """Patterns of the paths of sources, such as "*/test.json", whose frames all go to the validation split. The
    fractions are for the other frames."""
    test_files: ListOf[str] = ()
    """Patterns of the paths of sources whose frames all go to the test split."""

    @model_validator(mode="after")
    def _check_split(self) -> SplitSection:
        if self.group not in GROUPS and not self.group.startswith("info:"):
            raise ValueError(f"group '{self.group}' is not known{did_you_mean(self.group, [*GROUPS, 'info:KEY'])}.")
        fractions = (self.train, self.val, self.test)
        if abs(sum(fractions) - 1) > 1e-9 or self.train == 0:
            raise ValueError(f"train, val and test are {fractions}; they must add up to 1, with train above 0.")
        return self


class ConvertSettings(Section):
    """A complete conversion file."""

    format: str | None = None
    """Format of the sources; `hydrazero convert --list-formats` names those that are known. If it is not set, it is
    guessed from the suffix of each file."""
    float_dtype: Literal["float32", "float64"] = "float32"
    """Precision of positions, forces and stress in the shards. Energies are always stored in float64."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether to 'keep' or 'drop' frames whose geometry has occurred before."""
    degree_cutoffs: ListOf[PositiveFloat] = (4.0, 5.0, 6.0)
    """Distances in Å within which neighbours are counted for the manifest, which the size of batches is worked out
    from. The largest one takes most of the time."""
    energy_per_atom: bool = False
    """Whether the energies of the source are divided by the number of atoms."""
    references: Literal["fit", "isolated"] = "fit"
    """Where reference energies come from: 'fit' (least squares over the training split) or 'isolated' (the isolated
    atoms of the training split, of which there must be one for each of its elements)."""
    stress_order: str = ASE_STRESS_ORDER
    """Order of the six numbers of a stress or virial; that of VASP is "xx yy zz xy yz xz"."""
    fields: FieldNames = FieldNames()
    columns: dict[str, Name] = Field(default_factory=dict)
    """For HDF5, parquet, npz and LMDB: the dataset, column or key that holds each part of a structure, which is one of
    numbers, positions, cell, pbc, the labels, and ptr or n_atoms for ragged arrays. Any other name becomes a field of
    the frame."""
    units: SourceUnits = SourceUnits()
    labels: LabelSection = LabelSection()
    targets: dict[Annotated[str, AfterValidator(check_target_name)], TargetSection] = Field(default_factory=dict)
    """Further quantities that are taken over from the source, by the names that they get."""
    split: SplitSection = SplitSection()
    select: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values that are wanted of a field of the frame; frames with other values are left out and counted. Numbers
    compare as numbers, also with those in texts."""
    source: dict[str, Any] = Field(default_factory=dict)
    """Free text for the manifest: method, basis, code, citation, licence."""

    @model_validator(mode="after")
    def _check(self) -> ConvertSettings:
        known = [*LABELS, *self.targets]
        for label in self.labels.require:
            if label not in known:
                raise ValueError(f"labels.require: '{label}' is no label{did_you_mean(label, known)}.")
        if "energy" not in self.labels.require and not self.targets:
            raise ValueError("labels.require must hold 'energy', unless there are [targets] to learn.")
        stress_places(self.stress_order)
        return self

    def read_settings(self, *, trust_pickle: bool = False) -> ReadSettings:
        """Return the settings of a reader; the user decides whether pickles may be loaded, never a file."""
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
    """Return the settings of a conversion file, or the defaults, on top of those of a preset if one is named.

    `format_name` takes precedence over both. Raises ConfigError.
    """
    where = "convert settings:" if path is None else f"{path}:"
    table: dict[str, Any] = {} if preset is None else dict(load_preset(preset).table)
    if path is not None:
        table = _merged(table, read_toml(path, "settings file"))
    if format_name is not None:
        table["format"] = format_name
    return parse_settings(ConvertSettings, table, where)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the base with the values of the changes in place of its own, table by table."""
    both = {**base, **changes}
    for key in base.keys() & changes.keys():
        if isinstance(base[key], dict) and isinstance(changes[key], dict):
            both[key] = _merged(base[key], changes[key])
    return both
