"""Readers of source files. A new format is one file with a function like `read_ase`, and one line in READERS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydrazero.shards.errors import SourceError, did_you_mean
from hydrazero.shards.readers.ase_reader import read_ase, read_database, read_extxyz
from hydrazero.shards.readers.dpdata_reader import MARKER, read_deepmd
from hydrazero.shards.readers.extxyz_tar import read_extxyz_tar
from hydrazero.shards.readers.frames import FieldNames, Frame, ReadSettings, SourceUnits, UnreadFrame
from hydrazero.shards.readers.hdf5_groups import read_hdf5_groups
from hydrazero.shards.readers.hdf5_reader import read_hdf5
from hydrazero.shards.readers.json_datasets import read_alexandria, read_mptrj
from hydrazero.shards.readers.json_structures import read_jarvis, read_pymatgen
from hydrazero.shards.readers.lmdb_reader import read_aselmdb, read_lmdb
from hydrazero.shards.readers.n2p2_reader import read_n2p2
from hydrazero.shards.readers.npz_reader import read_npz
from hydrazero.shards.readers.opening import plain_suffix
from hydrazero.shards.readers.table_reader import read_parquet

READERS: dict[str, Callable[[Path, ReadSettings], Iterator[UnreadFrame]]] = {
    "ase": read_ase,
    "extxyz": read_extxyz,
    "db": read_database,
    "npz": read_npz,
    "hdf5": read_hdf5,
    "pymatgen": read_pymatgen,
    "jarvis": read_jarvis,
    "deepmd": read_deepmd,
    "n2p2": read_n2p2,
    "lmdb": read_lmdb,
    "aselmdb": read_aselmdb,
    "hdf5_groups": read_hdf5_groups,
    "mptrj": read_mptrj,
    "alexandria": read_alexandria,
    "extxyz_tar": read_extxyz_tar,
    "parquet": read_parquet,
}
BY_SUFFIX = {
    ".xyz": "extxyz",
    ".extxyz": "extxyz",
    ".db": "db",
    ".npz": "npz",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".lmdb": "lmdb",
    ".mdb": "lmdb",
    ".aselmdb": "aselmdb",
    ".tar": "extxyz_tar",
    ".tgz": "extxyz_tar",
    ".parquet": "parquet",
    ".traj": "ase",
}
SUFFIXES_OF = {
    # QM7-X packs its files as '1000.xz'.
    "hdf5_groups": (".h5", ".hdf5", ".xz"),
    "mptrj": (".json",),
    "alexandria": (".json",),
    "pymatgen": (".json",),
    "jarvis": (".json",),
    "n2p2": (".data",),
}
"""Suffixes by which files of a format are found in a folder, beyond those that it is guessed from."""

FOLDER_MARKERS = {"deepmd": MARKER}
"""Format whose sources are folders -> file that is in each of them."""

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
    """Return the sources: a folder stands for those of the format that are in it or below, sorted.

    Raises SourceError for a path that does not exist, or a folder with no source in it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise SourceError(f"source file {path} does not exist.")
        found += _sources_in(path, settings.format) if path.is_dir() else [path]
    return found


def _sources_in(folder: Path, name: str | None) -> list[Path]:
    marker = FOLDER_MARKERS.get(name or "")
    if marker is not None:
        found = [path.parent for path in folder.rglob(marker)]
        wanted = f"folder with a {marker}"
    else:
        suffixes = {suffix for suffix, guessed in BY_SUFFIX.items() if name in (None, guessed)}
        suffixes |= set(SUFFIXES_OF.get(name or "", ()))
        files = (path for path in folder.rglob("*") if path.is_file())
        found = [path for path in files if {plain_suffix(path), path.suffix.lower()} & suffixes]
        wanted = f"file with the suffix {' or '.join(sorted(suffixes))}" if suffixes else f"known suffix of '{name}'"
    if not found:
        raise SourceError(f"folder {folder} holds no {wanted}; name the files themselves.")
    return sorted(found)


def unread(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Come past the frames of a file, without reading those that the caller passes over.

    The format is guessed from the suffix if the settings name none. Raises SourceError where the file as a whole cannot
    be read, is empty, or the format is unknown.
    """
    name = settings.format or BY_SUFFIX.get(plain_suffix(path), "ase")
    if name not in READERS:
        raise SourceError(f"format '{name}' is not known{did_you_mean(name, list(READERS))}.")
    if not (path.is_dir() if name in FOLDER_MARKERS else path.is_file()):
        kind = "folder" if name in FOLDER_MARKERS else "file"
        raise SourceError(f"source {kind} {path} {f'is no {kind}' if path.exists() else 'does not exist'}.")
    if path.is_file() and path.stat().st_size == 0:
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
