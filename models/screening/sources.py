"""What to screen: structures of shard folders, of files that `convert` reads, of a generator, in one fixed order."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from hydrazero.models.screening.settings import CHUNK
from hydrazero.shards.errors import HydrazeroError, ShardError, SourceError, StructureError
from hydrazero.shards.manifest import MANIFEST_NAME, SPLITS, manifest_sha256
from hydrazero.shards.readers import READERS, expand_sources, unread
from hydrazero.shards.readers.frames import FieldNames, ReadSettings, UnreadFrame
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.structure import Structure, check_structure

GEOMETRY_ALONE = ReadSettings(fields=FieldNames(energy="", forces="", stress=""))
"""A label that is missing or faulty does not matter to a screen."""

Wanted = Callable[[int], bool]
"""Whether the chunk of this number is to be read."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A place in the sources that is to be screened."""

    index: int
    """Its number in all sources together."""
    source_id: str
    """'file#frame'."""
    read: Callable[[], Structure]
    """Gives the structure; raises StructureError, ShardError or SourceError if there is none."""


Items = Generator[Item, None, int]


class Source(Protocol):
    """Structures in an order that never changes."""

    def items(self, first: int, wanted: Wanted) -> Items:
        """Yield the items of wanted chunks, their indices counted from `first`; returns how many there are in all."""
        ...

    def identity(self) -> str:
        """Return what tells whether it is still the same source."""
        ...

    def known_length(self) -> int | None:
        """Return the number of structures, if it can be told without reading."""
        ...


class ShardSource:
    """All splits of a folder of shards."""

    def __init__(self, folder: Path) -> None:
        self.readers = [BlockReader(folder, split) for split in SPLITS]
        self.folder = folder

    def items(self, first: int, wanted: Wanted) -> Items:
        """See Source; blocks of which nothing is wanted are not read."""
        index = first
        for reader in self.readers:
            for number, size in enumerate(reader.block_sizes.tolist()):
                chunks = range(index // CHUNK, (index + size - 1) // CHUNK + 1)
                if any(map(wanted, chunks)):
                    yield from self._block(reader, number, index, wanted)
                index += size
        return index - first

    def _block(self, reader: BlockReader, number: int, first: int, wanted: Wanted) -> Iterator[Item]:
        where = f"{self.folder}/{reader.split}, block {number}"
        try:
            block = reader.read(number)
        except ShardError as error:
            fail = partial(_raise, error)
            for row in range(int(reader.block_sizes[number])):
                if wanted((first + row) // CHUNK):
                    yield Item(index=first + row, source_id=f"{where}, row {row}", read=fail)
            return
        for row in range(len(block)):
            if wanted((first + row) // CHUNK):
                name = block.names[row] or f"{where}, row {row}"
                yield Item(index=first + row, source_id=name, read=partial(block.structure, row))

    def identity(self) -> str:
        """Folder and digest of its manifest."""
        return f"{self.folder.resolve()} {manifest_sha256(self.folder)}"

    def known_length(self) -> int | None:
        """As the manifest tells it."""
        return sum(int(reader.block_sizes.sum()) for reader in self.readers)


class FileSource:
    """A file that `convert` reads."""

    def __init__(self, path: Path, settings: ReadSettings = GEOMETRY_ALONE) -> None:
        self.path, self.settings = path, settings
        self.name = path.name
        """What its structures are called by."""

    def items(self, first: int, wanted: Wanted) -> Items:
        """See Source; what makes the file unreadable is an item too, after those that could be read."""
        index = first
        try:
            for frame in unread(self.path, self.settings):
                if wanted(index // CHUNK):
                    source_id = self.name + frame.source_id.removeprefix(self.path.name)
                    yield Item(index=index, source_id=source_id, read=partial(_read, frame))
                index += 1
        except SourceError as error:
            if wanted(index // CHUNK):
                yield Item(index=index, source_id=self.name, read=partial(_raise, error))
            index += 1
        return index - first

    def identity(self) -> str:
        """Path, size and time of the last change, and how it is read."""
        status, settings = self.path.stat(), repr(self.settings).encode()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns} {zlib.crc32(settings)}"

    def known_length(self) -> int | None:
        """Not without reading."""
        return None


class MadeSource:
    """Structures that a function makes, always the same ones."""

    def __init__(self, name: str, make: Callable[[], Iterable[Structure]], length: int | None = None) -> None:
        self.name, self.make, self.length = name, make, length

    def items(self, first: int, wanted: Wanted) -> Items:
        """See Source; structures that are not wanted are made and left."""
        index = first
        for structure in self.make():
            if wanted(index // CHUNK):
                name = structure.source_id or f"{self.name}#{index - first}"
                yield Item(index=index, source_id=name, read=partial(_checked, structure))
            index += 1
        return index - first

    def identity(self) -> str:
        """Its name."""
        return self.name

    def known_length(self) -> int | None:
        """What it was told."""
        return self.length


def _raise(error: HydrazeroError) -> Structure:
    raise error


def _read(frame: UnreadFrame) -> Structure:
    found = frame.read()
    if found.structure is None:
        raise found.error or StructureError("unreadable", "the frame holds no structure")
    return found.structure


def _checked(structure: Structure) -> Structure:
    plain = replace(structure, energy=None, forces=None, stress=None)  # labels do not matter here
    check_structure(plain)
    return plain


def sources_of(paths: Sequence[Path], settings: ReadSettings = GEOMETRY_ALONE) -> list[Source]:
    """Return the sources at paths: shard folders, files, and folders of files.

    Raises SourceError for a path that does not exist or holds nothing to read, ShardError for a damaged manifest.
    """
    if settings.format is not None:
        READERS.check(settings.format)
    found: list[Source] = []
    for path in paths:
        if (path / MANIFEST_NAME).is_file():
            found.append(ShardSource(path))
        else:
            found += [FileSource(file, settings) for file in expand_sources([path], settings)]
    files = [source for source in found if isinstance(source, FileSource)]
    for source, name in zip(files, names_apart([source.path for source in files]), strict=True):
        source.name = name
    return found


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Return as many last parts of each path as tell it from all others of the same name."""
    parts = [path.resolve().parts for path in paths]
    taken = [1] * len(parts)
    while True:
        names = ["/".join(each[-count:]) for each, count in zip(parts, taken, strict=True)]
        counts = Counter(names)
        longer = [n for n, name in enumerate(names) if counts[name] > 1 and taken[n] < len(parts[n])]
        if not longer:
            return names
        for n in longer:
            taken[n] += 1


def walk(sources: Sequence[Source], wanted: Wanted) -> Items:
    """Yield the items of wanted chunks of all sources; returns the number of structures in them all."""
    index = 0
    for source in sources:
        index += yield from source.items(index, wanted)
    return index


def structure_at(item: Item) -> Structure:
    """Read an item; raises StructureError with the reason, whatever kind of fault it is."""
    try:
        return item.read()
    except (ShardError, SourceError) as error:
        raise StructureError("unreadable", str(error)) from error
