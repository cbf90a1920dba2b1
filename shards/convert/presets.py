"""Presets: conversion files of large open datasets as they are distributed, for `hydrazero convert --preset NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hydrazero.shards.errors import ConfigError, did_you_mean
from hydrazero.shards.files import read_toml
from hydrazero.shards.settings_parser import Section, parse_settings


class About(Section):
    """Facts that a user wants to know about a dataset before downloading it."""

    title: str
    """Name of the dataset, with its number of structures."""
    elements: str
    """Elements that occur in it."""
    theory: str
    """Level of theory."""
    download: str
    """Where the archives can be downloaded."""
    layout: str
    """How the archives are laid out."""
    structures: int = 0
    """Number of structures in the archives; 0 where that is not known."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A dataset: a description of it, and the settings that convert it."""

    name: str
    about: About
    table: Mapping[str, Any]
    """Content of the conversion file."""


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    folder = resources.files("hydrazero.shards") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> Preset:
    """Return a preset; raises ConfigError for an unknown name."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"preset '{name}' is not known{did_you_mean(name, names)}; see --list-presets.")
    table = read_toml(resources.files("hydrazero.shards") / "presets" / f"{name}.toml", "preset")
    about = parse_settings(About, table.pop("about"), f"preset {name}: about")
    return Preset(name=name, about=about, table=table)
