"""Readers of source files, found by the name of their format or by the suffix of a file.

A built-in reader is a function `read_NAME(path, settings)` with the decorator `reader`, and a line in READERS. Another
package adds one as an entry point of the group 'hydrazero.readers', whose name is that of the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from hydrazero.shards.errors import SourceError
from hydrazero.shards.plugins import Registry
from hydrazero.shards.readers.frames import (
    FieldNames,
    Frame,
    Reader,
    ReadFunction,
    ReadSettings,
    SourceUnits,
    UnreadFrame,
)
from hydrazero.shards.readers.opening import plain_suffix

_PACKAGE = "hydrazero.shards.readers"
READERS: Registry[Reader | ReadFunction] = Registry(
    kind="format",
    group="hydrazero.readers",
    builtin={
        "ase": f"{_PACKAGE}.ase_reader:read_ase",
        "extxyz": f"{_PACKAGE}.extxyz.text:read_extxyz",
        "db": f"{_PACKAGE}.ase_reader:read_database",
        "npz": f"{_PACKAGE}.npz_reader:read_npz",
        "hdf5": f"{_PACKAGE}.hdf5_reader:read_hdf5",
        "pymatgen": f"{_PACKAGE}.json_structures:read_pymatgen",
        "jarvis": f"{_PACKAGE}.json_structures:read_jarvis",
        "deepmd": f"{_PACKAGE}.dpdata_reader:read_deepmd",
        "n2p2": f"{_PACKAGE}.n2p2_reader:read_n2p2",
        "lmdb": f"{_PACKAGE}.lmdb_reader:read_lmdb",
        "aselmdb": f"{_PACKAGE}.lmdb_reader:read_aselmdb",
        "hdf5_groups": f"{_PACKAGE}.hdf5_groups:read_hdf5_groups",
        "mptrj": f"{_PACKAGE}.json_datasets:read_mptrj",
        "alexandria": f"{_PACKAGE}.json_datasets:read_alexandria",
        "extxyz_tar": f"{_PACKAGE}.extxyz.tar:read_extxyz_tar",
        "parquet": f"{_PACKAGE}.table_reader:read_parquet",
    },
    error=SourceError,
)
"""Readers by the names of their formats."""

__all__ = [
    "READERS",
    "FieldNames",
    "Frame",
    "ReadSettings",
    "Reader",
    "SourceUnits",
    "UnreadFrame",
    "expand_sources",
    "read_frames",
    "reader_of",
    "unread",
]


def reader_of(name: str) -> Reader:
    """Return the reader of a format; raise SourceError if the format is unknown or its package cannot be imported."""
    found = READERS.get(name)
    return found if isinstance(found, Reader) else Reader(function=found)


@cache
def _formats_by_suffix() -> dict[str, str]:
    """Return suffix -> format for all formats that are guessed; a built-in format has precedence over others."""
    formats: dict[str, str] = {}
    for name in READERS.names():
        for suffix in reader_of(name).suffixes:
            other = formats.setdefault(suffix, name)
            if other != name and READERS.package_of(other) is not None:
                raise SourceError(
                    f"the formats '{other}' and '{name}' of installed packages both claim the suffix {suffix}; "
                    "uninstall one of them, or name the format with --format."
                )
    return formats


def expand_sources(paths: Sequence[Path], settings: ReadSettings) -> list[Path]:
    """Return all sources at the given paths; a folder stands for those of the format in it or below, sorted.

    Raises SourceError for an unknown format, a path that does not exist, or a folder with no source in it.
    """
    if settings.format is not None:
        READERS.check(settings.format)
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise SourceError(f"source file {path} does not exist.")
        found += _sources_in(path, settings.format) if path.is_dir() else [path]
    return found


def _sources_in(folder: Path, name: str | None) -> list[Path]:
    reader = None if name is None else reader_of(name)
    if reader is not None and reader.marker:
        found = [path.parent for path in folder.rglob(reader.marker)]
        missing = f"folder with a file {reader.marker}"
    else:
        suffixes = set(_formats_by_suffix()) if reader is None else {*reader.suffixes, *reader.further_suffixes}
        if not suffixes:
            raise SourceError(
                f"format '{name}' has no suffix to look for in the folder {folder}; name the files themselves."
            )
        files = (path for path in folder.rglob("*") if path.is_file())
        found = [path for path in files if {plain_suffix(path), path.suffix.lower()} & suffixes]
        missing = f"file with the suffix {' or '.join(sorted(suffixes))}"
    if not found:
        raise SourceError(
            f"folder {folder} holds no {missing}; name the files themselves, and their format with --format (see "
            "'hydrazero convert --list-formats')."
        )
    return sorted(found)


def unread(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Walk through the frames of a source; those that the caller skips are not read.

    The format is guessed from the suffix if the settings name none. Raises SourceError if the source as a whole cannot
    be read or is empty, or if the format is unknown.
    """
    name = settings.format or _formats_by_suffix().get(plain_suffix(path), "ase")
    reader = reader_of(name)
    if not (path.is_dir() if reader.marker else path.is_file()):
        kind = "folder" if reader.marker else "file"
        raise SourceError(f"source {kind} {path} {f'is not a {kind}' if path.exists() else 'does not exist'}.")
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"source file {path} is empty.")
    count = 0
    for frame in reader(path, settings):
        count += 1
        yield frame
    if count == 0:
        raise SourceError(f"source file {path} holds no structure in the format '{name}'.")


def read_frames(path: Path, settings: ReadSettings) -> Iterator[Frame]:
    """Yield the frames of a source, with labels in eV and Å; a faulty frame is a Frame with an error.

    Raises what `unread` raises.
    """
    for frame in unread(path, settings):
        yield frame.read()
