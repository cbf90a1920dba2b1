"""Readers of source files. A new format is one file with a function like `read_ase`, and one line in READERS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydrazero.shards.errors import SourceError, did_you_mean
from hydrazero.shards.readers.ase_reader import read_ase, read_database, read_extxyz
from hydrazero.shards.readers.frames import FieldNames, Frame, ReadSettings, SourceUnits, UnreadFrame
from hydrazero.shards.readers.npz_reader import read_npz
from hydrazero.shards.readers.opening import plain_suffix

READERS: dict[str, Callable[[Path, ReadSettings], Iterator[UnreadFrame]]] = {
    "ase": read_ase,
    "extxyz": read_extxyz,
    "db": read_database,
    "npz": read_npz,
}
BY_SUFFIX = {".xyz": "extxyz", ".extxyz": "extxyz", ".db": "db", ".npz": "npz"}

__all__ = [
    "READERS",
    "FieldNames",
    "Frame",
    "ReadSettings",
    "SourceUnits",
    "UnreadFrame",
    "expand_sources",
    "read_frames",
    "unread",
]


def expand_sources(paths: Sequence[Path], settings: ReadSettings) -> list[Path]:
    """Return the source files; raises SourceError for one that does not exist."""
    for path in paths:
        if not path.exists():
            raise SourceError(f"source file {path} does not exist.")
    return list(paths)


def unread(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Come past the frames of a file, without reading those that the caller passes over.

    The format is guessed from the suffix if the settings name none. Raises SourceError where the file as a whole cannot
    be read, is empty, or the format is unknown.
    """
    name = settings.format or BY_SUFFIX.get(plain_suffix(path), "ase")
    if name not in READERS:
        raise SourceError(f"format '{name}' is not known{did_you_mean(name, list(READERS))}.")
    if not path.is_file():
        raise SourceError(f"source file {path} {'is no file' if path.exists() else 'does not exist'}.")
    if path.stat().st_size == 0:
        raise SourceError(f"source file {path} is empty.")
    count = 0
    for frame in READERS[name](path, settings):
        count += 1
        yield frame
    if count == 0:
        raise SourceError(f"source file {path} holds no structure that the format '{name}' finds.")


def read_frames(path: Path, settings: ReadSettings) -> Iterator[Frame]:
    """Read a file frame by frame, labels converted to eV, Å; a bad frame comes as a Frame with an error.

    Raises what `unread` raises.
    """
    for frame in unread(path, settings):
        yield frame.read()
