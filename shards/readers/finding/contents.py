"""Formats that share their suffix with others, recognised by what a file holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.column_names import column_names
from hydrazero.shards.readers.frames import ReadSettings
from hydrazero.shards.readers.opening import READ_ERRORS, open_binary, optional_module
from hydrazero.shards.readers.parts.own_items import OwnItems

HEAD = 1 << 18
"""Number of bytes of a file by which its format is recognised."""

JSON_MARKS = (
    ("fitsnap", r'\A\s*\{\s*"Dataset"\s*:'),
    ("alexandria", r'\A\s*\{\s*"entries"\s*:'),
    ("mptrj", r'\A\s*\{\s*"mp-\d+"\s*:\s*\{'),
    ("jarvis", r'\A\s*[\[{].*"lattice_mat"\s*:'),
    ("pymatgen", r'\A\s*\[?\s*\{.*"sites"\s*:'),
)
"""Format of JSON -> pattern of the beginning of its files; the first that fits counts."""

LAYOUTS = (
    ("comp6", ("species", "coordinates", "energies", "forces"), "COMP6"),
    ("ani1", ("species", "coordinates", "energies"), "ANI-1"),
    ("ani1x", ("atomic_numbers", "coordinates", "wb97x_dz.energy"), "ANI-1x"),
    ("aimnet2", ("numbers", "coord", "energy"), "AIMNet2"),
    ("qm7x", ("atNUM", "atXYZ", "ePBE0+MBD"), "QM7-X"),
    ("transition1x", ("atomic_numbers", "positions", "wB97x_6-31G(d).energy"), "Transition1x"),
)
"""Preset, the names of datasets in a group by which its files are recognised, and who writes such files."""

SEARCHED_GROUPS = 200
"""Number of groups of an HDF5 file that are looked at."""


def json_format(path: Path) -> str | None:
    """Return the format of a JSON file; None if it is not recognised."""
    head = _head(path)
    if head.lstrip().startswith("#"):  # FitSNAP writes a comment before the data
        head = head.partition("\n")[2]
    return next((name for name, pattern in JSON_MARKS if re.search(pattern, head, re.DOTALL)), None)


def data_format(path: Path) -> str | None:
    """Return 'n2p2' for a file '.data' of frames between 'begin' and 'end'; None for any other."""
    lines = (line.strip().lower() for line in _head(path).splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return "n2p2" if first.split()[:1] == ["begin"] else None


def hdf5_format(path: Path, settings: ReadSettings) -> str:
    """Return 'hdf5' or 'hdf5_groups' for an HDF5 file.

    Raises SourceError for a layout that a preset reads, with its name: the file does not say its units, the preset
    does.
    """
    h5py = optional_module("h5py", "h5py", f"{path}: reading HDF5")
    names = column_names(settings)
    own = {names["numbers"], names["positions"]}
    try:
        with h5py.File(path, "r") as file:
            if {"ptr", "n_atoms"} & {*file, *settings.columns}:
                return "hdf5"
            for group in _groups(file, h5py):
                items = OwnItems(h5py, group, path)
                held = {name for name in items if items.dataset(name) is not None}
                if own <= held:
                    return "hdf5_groups"
                for preset, layout, makers in LAYOUTS:
                    if held.issuperset(layout) and not settings.columns:
                        raise SourceError(
                            f"{path} has groups with {', '.join(layout)}, as {makers} has; convert it with --preset "
                            f"{preset}, which knows units and signs, or say with --config what they are (format = "
                            "'hdf5_groups')."
                        )
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, SourceError):
            raise
    return "hdf5"  # whose reader says what is missing


def _groups(file: Any, h5py: Any) -> Iterator[Any]:
    """Yield groups of a file, depth first, without following links to other files."""
    waiting, seen = [file], 0
    while waiting and seen < SEARCHED_GROUPS:
        group = waiting.pop()
        seen += 1
        yield group
        for name in list(group)[:SEARCHED_GROUPS]:
            if isinstance(group.get(name, getlink=True), h5py.HardLink):
                inner = group.get(name)
                if isinstance(inner, h5py.Group):
                    waiting.append(inner)


def _head(path: Path) -> str:
    """Return the beginning of a file, or nothing if it cannot be read: then its reader says why."""
    try:
        with open_binary(path) as (file, _):
            return file.read(HEAD).decode("utf-8-sig", "replace")
    except (*READ_ERRORS, SourceError):
        return ""
