"""What a folder of sources holds: files and folders that are read, results of earlier commands, and other files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from hydrazero.shards.manifest import FORMAT, MANIFEST_NAME
from hydrazero.shards.readers.opening import is_hidden
from hydrazero.shards.text.foreign_text import escaped

NAMED = 8
"""Largest number of files that a sentence names."""

RESULTS = (
    ("_screen.json",),
    ("_summary.json",),
    ("run.json", "model.json"),
    ("journal.log", "trials"),
    ("evaluation.json", "predictions"),
)
"""Names that occur together in folders of screens, runs, searches and evaluations."""
PREDICTIONS = ".predictions"
"""Ending of the name of the folder that an evaluation writes beside a model file."""
SCREENED = b"hydrazero.screen"
"""Beginning of the keys in the metadata of a screen's Parquet files."""

ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|citation|(sha\d*|md5)sums?|checksums?)([-_]\w+|([-_.]\w+)*\.(md|txt|rst|cff|bib))?"
    r"|.+\.(md5|sha1|sha256|sha512)",
    re.IGNORECASE,
)
"""Names of files about the data beside them: descriptions, licences, citations and checksums."""


@dataclass(frozen=True, kw_only=True)
class FolderContent:
    """The content of a folder of sources, without hidden files."""

    folder: Path
    sources: tuple[Path, ...]
    """Files and folders that are read, sorted."""
    others: tuple[str, ...]
    """Other files, by their paths in the folder, except those about the data, such as README."""
    results: tuple[str, ...]
    """Results of earlier commands, which are no sources, by their paths in the folder."""

    def sentences(self, kind: str = "no known format") -> list[str]:
        """Return what was not read, in at most two sentences; the files are in `kind`."""
        found = []
        if self.others:
            found.append(f"{not_read(self.others, str(self.folder), kind)}.")
        if self.results:
            many = len(self.results) > 1
            found.append(
                f"{'results' if many else 'a result'} of earlier commands in '{escaped(self.folder)}' "
                f"{'were' if many else 'was'} not read: {_listed(self.results)}."
            )
        return found


def not_read(names: Collection[str], where: str, kind: str) -> str:
    """Return a sentence without its full stop on files that were not read, since they are in `kind`."""
    many = len(names) != 1
    return (
        f"{len(names):,} file{'s' * many} of '{escaped(where)}' {'are' if many else 'is'} in {kind} and "
        f"{'were' if many else 'was'} not read: {_listed(names)}"
    )


def _listed(names: Collection[str]) -> str:
    first = ", ".join(escaped(name) for name in list(names)[:NAMED])
    return first if len(names) <= NAMED else f"{first} and {len(names) - NAMED:,} more"


def folder_content(folder: Path, is_source: Callable[[Path], bool], markers: Collection[str]) -> FolderContent:
    """Return the content of a folder and of those in it.

    A folder with a file whose name is one of the `markers` is a source as a whole; `is_source` says which files are.
    Hidden files and folders, and those that systems add, are left out. Links to folders are not followed.
    """
    sources: list[Path] = []
    others: list[str] = []
    results: list[str] = []
    for name, folders, files in os.walk(folder):
        here = Path(name)
        within = here.relative_to(folder)
        if here != folder and is_result(here, files, folders):
            results.append(f"{within}/")
            folders.clear()
            continue
        if any(name in markers for name in files):
            sources.append(here)
            folders.clear()
            continue
        folders[:] = sorted(each for each in folders if not is_hidden(each))
        for each in sorted(each for each in files if not is_hidden(each)):
            path = here / each
            if path.is_file() and is_source(path):
                if path.suffix.lower() == ".parquet" and is_screened(path):
                    results.append(str(within / each))
                else:
                    sources.append(path)
            elif not ABOUT.fullmatch(each):
                others.append(str(within / each))
    return FolderContent(
        folder=folder, sources=tuple(sorted(sources)), others=tuple(sorted(others)), results=tuple(sorted(results))
    )


def is_result(folder: Path, files: Collection[str], folders: Collection[str]) -> bool:
    """Return whether a folder with the given files and folders is the result of a command, such as shards or a run."""
    if MANIFEST_NAME in files and is_shards(folder):
        return True
    names = {*files, *folders}
    return any(names.issuperset(together) for together in RESULTS) or (
        folder.name.endswith(PREDICTIONS)
        and folder.with_name(f"{folder.name.removesuffix(PREDICTIONS)}.evaluation.json").is_file()
    )


def is_shards(folder: Path) -> bool:
    """Return whether a folder holds shards: whether its manifest begins as one does."""
    try:
        with open(folder / MANIFEST_NAME, "rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(4096)
    except OSError:
        return False


def is_screened(path: Path) -> bool:
    """Return whether a Parquet file is the result of a screen."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return any(key.startswith(SCREENED) for key in metadata)
