"""Named settings of the large open datasets, in their layouts as distributed: `hydrazero convert --preset NAME`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.settings_parser import parse_settings


@dataclass(frozen=True, kw_only=True)
class About:
    """What a user wants to know of a dataset before downloading it."""

    title: str
    elements: str
    theory: str
    """Level of theory."""
    download: str
    """Where the archives are."""
    layout: str
    """What they look like."""
    structures: int = 0
    """In the archives, as the title says; 0 where that is not known."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A dataset: what it is, and the table of settings that converts it."""

    name: str
    about: About
    table: Mapping[str, Any]
    """As a conversion's settings file."""


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    folder = resources.files("hydrazero.shards") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> Preset:
    """Return a preset; raises ConfigError for an unknown name."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"preset '{name}' is not known{did_you_mean(name, names)}; see --list-presets.")
    text = (resources.files("hydrazero.shards") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    about = parse_settings(About, table.pop("about"), f"preset {name}: about")
    return Preset(name=name, about=about, table=table)
