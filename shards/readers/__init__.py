"""Readers of source files, found by the name of their format or by the suffix of a file.

A built-in reader is a function `read_NAME(path, settings)` with the decorator `reader`, and a line in READERS. Another
package adds one as an entry point of the group 'hydrazero.readers', whose name is that of the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hydrazero.shards.errors import SourceError
from hydrazero.shards.plugins import Registry
from hydrazero.shards.readers.finding.contents import data_format, hdf5_format, json_format
from hydrazero.shards.readers.finding.folders import FolderContent, folder_content, is_shards, not_read
from hydrazero.shards.readers.frames import (
    FieldNames,
    Frame,
    Reader,
    ReadFunction,
    ReadSettings,
    SourceUnits,
    UnreadFrame,
)
from hydrazero.shards.readers.opening import COMPRESSIONS, ZIP, check_compression, plain_suffix, unpacked
from hydrazero.shards.text.foreign_text import escaped

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
        "fitsnap": f"{_PACKAGE}.codes.fitsnap:read_fitsnap",
        "xsf": f"{_PACKAGE}.codes.xsf:read_xsf",
        "parquet": f"{_PACKAGE}.table_reader:read_parquet",
    },
    error=SourceError,
)
"""Readers by the names of their formats."""

NEED_PLAIN = ("ase", "db", "npz", "hdf5", "hdf5_groups", "parquet", "lmdb", "aselmdb")
"""Formats that need to seek in a file: a compressed one is unpacked into a temporary file before it is read."""
MAPPED = ("lmdb", "aselmdb")
"""Formats that are read in place, so that a compressed file must be unpacked by the user."""

__all__ = [
    "READERS",
    "FieldNames",
    "FoundSources",
    "Frame",
    "ReadSettings",
    "Reader",
    "SourceUnits",
    "UnreadFrame",
    "expand_sources",
    "find_sources",
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


@dataclass(frozen=True, kw_only=True)
class FoundSources:
    """The sources at some paths, and what is there besides."""

    files: tuple[Path, ...]
    """Sources: files, or folders of formats whose sources are folders."""
    not_read: tuple[str, ...] = ()
    """Sentences on files that are not read, since they are in no format that is read, or results of commands."""


def expand_sources(paths: Sequence[Path], settings: ReadSettings) -> list[Path]:
    """Return all sources at the given paths, as `find_sources` does."""
    return list(find_sources(paths, settings).files)


def find_sources(paths: Sequence[Path], settings: ReadSettings) -> FoundSources:
    """Return all sources at the given paths; a folder stands for those of the format in it or below, sorted.

    Hidden files of a folder, and results of earlier commands in it, are no sources. Raises SourceError for an unknown
    format, a path that does not exist, or a folder with no source in it.
    """
    if settings.format is not None:
        READERS.check(settings.format)
    found: list[Path] = []
    sentences: list[str] = []
    for path in paths:
        if not path.exists():
            raise SourceError(f"source file {path} does not exist.")
        if path.is_dir():
            content = _content_of(path, settings)
            found += content.sources
            sentences += content.sentences(_kind(settings))
        else:
            found.append(path)
    for path in found:
        if path.is_file() and _is_tar(path, settings):
            from hydrazero.shards.readers.extxyz.tar import members_not_read

            if names := members_not_read(path):
                sentences.append(f"{not_read(names, str(path), 'another format than extended XYZ')}.")
    return FoundSources(files=tuple(found), not_read=tuple(sentences))


def _kind(settings: ReadSettings) -> str:
    return "no known format" if settings.format is None else f"another format than '{settings.format}'"


def _is_tar(path: Path, settings: ReadSettings) -> bool:
    return settings.format == "extxyz_tar" or (settings.format is None and _by_suffix(path) == "extxyz_tar")


def _content_of(folder: Path, settings: ReadSettings) -> FolderContent:
    """Return the content of a folder; raise SourceError if there is no source in it."""
    if is_shards(folder):
        raise SourceError(
            f"{folder} is a folder of shards, which are the result of a conversion; name the files that they were made "
            "from."
        )
    chosen = None if settings.format is None else reader_of(settings.format)
    markers = _markers() if chosen is None else dict.fromkeys(filter(None, [chosen.marker]), settings.format)
    suffixes = set(_formats_by_suffix()) if chosen is None else {*chosen.suffixes, *chosen.further_suffixes}
    missing = f"file with the suffix {' or '.join(sorted(suffixes))}"
    if chosen is not None and chosen.marker:
        missing = f"folder with a file {chosen.marker}"
    elif not suffixes:
        raise SourceError(
            f"format '{settings.format}' has no suffix to look for in the folder {folder}; name the files themselves."
        )

    def is_source(path: Path) -> bool:
        known = bool({plain_suffix(path), path.suffix.lower()} & suffixes)
        return known or (chosen is None and _by_content(path) is not None)

    content = folder_content(folder, is_source, markers)
    if not content.sources:
        seen = f"; {' '.join(content.sentences(_kind(settings))).removesuffix('.')}" if content.others else ""
        raise SourceError(
            f"folder {folder} holds no {missing}{seen}; name the files themselves, and their format with --format (see "
            "'hydrazero convert --list-formats')."
        )
    return content


@cache
def _markers() -> dict[str, str]:
    """Return name of a file -> format, for all formats whose sources are folders with that file."""
    return {reader_of(name).marker: name for name in READERS.names() if reader_of(name).marker}


def _by_suffix(path: Path) -> str | None:
    return _formats_by_suffix().get(plain_suffix(path))


def _by_content(path: Path) -> str | None:
    """Return the format of a file whose suffix several formats share; None for others, and if it is not recognised."""
    suffix = plain_suffix(path)
    if suffix in ("", ".json", ".jsonl", ".ndjson", ".data"):
        return data_format(path) if suffix in ("", ".data") else json_format(path)
    return None


def _format_of(path: Path, settings: ReadSettings) -> str:
    """Return the format of a source for which the settings name none: by its suffix, or by what it holds."""
    if path.is_dir():
        return next((name for marker, name in _markers().items() if (path / marker).is_file()), "ase")
    name = _by_suffix(path)
    if name == "hdf5" and path.suffix.lower() not in COMPRESSIONS:
        return hdf5_format(path, settings)
    return name or _by_content(path) or "ase"


def unread(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Walk through the frames of a source; those that the caller skips are not read.

    The format is guessed from the suffix, or from the content where formats share a suffix, if the settings name none.
    Raises SourceError if the source as a whole cannot be read or is empty, or if the format is unknown.
    """
    check_compression(path)
    name = settings.format or _format_of(path, settings)
    reader = reader_of(name)
    if not (path.is_dir() if reader.marker else path.is_file()):
        kind = "folder" if reader.marker else "file"
        raise SourceError(f"source {kind} {path} {f'is not a {kind}' if path.exists() else 'does not exist'}.")
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"source file {path} is empty.")
    packed = path.suffix.lower()
    if path.is_file() and (packed == ZIP or (packed in COMPRESSIONS and name in NEED_PLAIN)):
        yield from _unread_copy(path, name, settings)
        return
    count = 0
    try:
        for frame in reader(path, settings):
            count += 1
            yield frame
    except SourceError as error:
        if count or settings.format is not None or not _is_unknown(path):
            raise
        raise SourceError(_unknown_suffix(path)) from error
    if count == 0:
        if settings.format is None and path.is_file() and path.suffix and name == "ase" and _by_suffix(path) is None:
            raise SourceError(_unknown_suffix(path))
        raise SourceError(f"source file {path} holds no structure in the format '{name}'.")


def _is_unknown(path: Path) -> bool:
    """Return whether neither a reader nor ASE knows the suffix of a file, and its content is of no known format."""
    from ase.io.formats import extension2format

    suffix = plain_suffix(path)
    if not suffix or not path.is_file() or suffix[1:] in extension2format:
        return False
    return _by_suffix(path) is None and _by_content(path) is None


def _unknown_suffix(path: Path) -> str:
    return (
        f"source file {path} holds no structure that is recognised, and its suffix {escaped(path.suffix)} is not "
        "known; name the format with --format."
    )


def _unread_copy(path: Path, name: str, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Walk through the frames of an unpacked copy of a source, under the name of the source itself."""
    if name in MAPPED:
        raise SourceError(f"source file {path} is compressed, and its format is read in place; unpack it first.")
    with unpacked(path) as copy:
        try:
            for frame in unread(copy, settings):
                yield _renamed(frame, copy.name, path.name)
        except SourceError as error:
            raise SourceError(str(error).replace(str(copy), str(path))) from error


def _renamed(frame: UnreadFrame, copy: str, name: str) -> UnreadFrame:
    """Return a frame of a copy whose source id begins with the name of the source instead of that of the copy."""
    source_id = name + frame.source_id.removeprefix(copy)

    def read() -> Frame:
        made = frame.read()
        structure = None if made.structure is None else replace(made.structure, source_id=source_id)
        return replace(made, source_id=source_id, structure=structure)

    return replace(frame, source_id=source_id, read=read)


def read_frames(path: Path, settings: ReadSettings) -> Iterator[Frame]:
    """Yield the frames of a source, with labels in eV and Å; a faulty frame is a Frame with an error.

    Raises what `unread` raises.
    """
    for frame in unread(path, settings):
        yield frame.read()
