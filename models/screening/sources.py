"""Sources of a screen: shard folders, files that `convert` can read, and functions, in one fixed order."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from hydrazero.models.inference.ase_structure import check_names, unread_condition
from hydrazero.models.screening.settings import CHUNK
from hydrazero.shards.errors import HydrazeroError, ShardError, SourceError, StructureError
from hydrazero.shards.manifest import MANIFEST_NAME, SPLITS, manifest_sha256
from hydrazero.shards.readers import READERS, find_sources, unread
from hydrazero.shards.readers.frames import FieldNames, ReadSettings, UnreadFrame
from hydrazero.shards.stream.block_reader import BlockReader
from hydrazero.shards.structure import Structure, check_structure
from hydrazero.shards.text.foreign_text import escaped

GEOMETRY_ALONE = ReadSettings(fields=FieldNames(energy="", forces="", stress=""))
"""Settings by which labels are ignored, since a screen does not use them."""

ChunkFilter = Callable[[int], bool]
"""A function that returns whether the chunk of a number is to be read."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A structure to screen, which is not read yet."""

    index: int
    """Number of the structure in all sources together."""
    source_id: str
    """File and frame, as 'file#frame'."""
    read: Callable[[], Structure]
    """Return the structure; raise StructureError, ShardError or SourceError if it cannot be read."""
    unread: Callable[[], str | None] | None = None
    """After `read`, return a charge or spin of the structure under a name that is not read; None if there cannot be."""


Items = Generator[Item, None, int]


class Source(Protocol):
    """Structures in an order that is the same each time they are read."""

    def items(self, first: int, selected: ChunkFilter) -> Items:
        """Yield the items of the selected chunks, with indices counted from `first`; return the number of all items."""
        ...

    def identity(self) -> str:
        """Return a text that changes if the source changes."""
        ...

    def known_length(self) -> int | None:
        """Return the number of structures, None if it is not known before they are read."""
        ...


class ShardSource:
    """All splits of a folder of shards."""

    def __init__(self, folder: Path) -> None:
        self.readers = [BlockReader(folder, split) for split in SPLITS]
        self.folder = folder

    def items(self, first: int, selected: ChunkFilter) -> Items:
        """Yield items as `Source.items` does; blocks without selected chunks are not read."""
        index = first
        for reader in self.readers:
            for number, size in enumerate(reader.block_sizes.tolist()):
                chunks = range(index // CHUNK, (index + size - 1) // CHUNK + 1)
                if any(map(selected, chunks)):
                    yield from self._block(reader, number, index, selected)
                index += size
        return index - first

    def _block(self, reader: BlockReader, number: int, first: int, selected: ChunkFilter) -> Iterator[Item]:
        where = f"{self.folder}/{reader.split}, block {number}"
        try:
            block = reader.read(number)
        except ShardError as error:
            fail = partial(_raise, error)
            for row in range(int(reader.block_sizes[number])):
                if selected((first + row) // CHUNK):
                    yield Item(index=first + row, source_id=f"{where}, row {row}", read=fail)
            return
        for row in range(len(block)):
            if selected((first + row) // CHUNK):
                name = block.names[row] or f"{where}, row {row}"
                yield Item(index=first + row, source_id=name, read=partial(block.structure, row))

    def identity(self) -> str:
        """Return the folder and the digest of its manifest."""
        return f"{self.folder.resolve()} {manifest_sha256(self.folder)}"

    def known_length(self) -> int | None:
        """Return the number of structures in the manifest."""
        return sum(int(reader.block_sizes.sum()) for reader in self.readers)


class FileSource:
    """A file that `convert` can read."""

    def __init__(self, path: Path, settings: ReadSettings = GEOMETRY_ALONE) -> None:
        self.path, self.settings = path, settings
        self.name = escaped(path.name)
        """Name of the file in the source ids of its structures."""
        self.conditions_matter = False
        """Whether results depend on charge and spin, so that a frame whose charge stands under another name is bad."""
        self._unread: str | None = None

    def items(self, first: int, selected: ChunkFilter) -> Items:
        """Yield items as `Source.items` does; if the file cannot be read to its end, the last item raises the error."""
        index = first
        try:
            for frame in unread(self.path, self.settings):
                if selected(index // CHUNK):
                    source_id = self.name + escaped(frame.source_id.removeprefix(self.path.name))
                    read = partial(self._read, frame)
                    yield Item(index=index, source_id=source_id, read=read, unread=lambda: self._unread)
                index += 1
        except SourceError as error:
            if selected(index // CHUNK):
                yield Item(index=index, source_id=self.name, read=partial(_raise, error))
            index += 1
        return index - first

    def _read(self, frame: UnreadFrame) -> Structure:
        result = frame.read()
        if result.structure is None:
            raise result.error or StructureError("unreadable", "the frame holds no structure")
        fields, found = self.settings.fields, result.structure
        charge = None if found.charge else fields.charge
        multiplicity = None if found.multiplicity else fields.multiplicity
        if self.conditions_matter:
            check_names(result.info, charge, multiplicity)
        self._unread = unread_condition(result.info, charge, multiplicity)
        return result.structure

    def identity(self) -> str:
        """Return path, size, modification time and a checksum of the reading settings."""
        status, settings = self.path.stat(), repr(self.settings).encode()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns} {zlib.crc32(settings)}"

    def known_length(self) -> int | None:
        """Return None: the number of frames is not known before the file is read."""
        return None


class FunctionSource:
    """Structures made by a function that makes the same ones at every call."""

    def __init__(self, name: str, make: Callable[[], Iterable[Structure]], length: int | None = None) -> None:
        self.name, self.make, self.length = name, make, length

    def items(self, first: int, selected: ChunkFilter) -> Items:
        """Yield items as `Source.items` does; structures of other chunks are made too, and dropped."""
        index = first
        for structure in self.make():
            if selected(index // CHUNK):
                name = structure.source_id or f"{self.name}#{index - first}"
                yield Item(index=index, source_id=name, read=partial(_checked, structure))
            index += 1
        return index - first

    def identity(self) -> str:
        """Return the name."""
        return self.name

    def known_length(self) -> int | None:
        """Return the length given at creation."""
        return self.length


def _raise(error: HydrazeroError) -> Structure:
    raise error


def _checked(structure: Structure) -> Structure:
    plain = replace(structure, energy=None, forces=None, stress=None)  # invalid labels must not reject it
    check_structure(plain)
    return plain


def sources_of(
    paths: Sequence[Path], settings: ReadSettings = GEOMETRY_ALONE, say: Callable[[str], None] = lambda _: None
) -> list[Source]:
    """Return the sources at paths, which are shard folders, files or folders of files.

    `say` gets a sentence on files of folders that are not read. Raises SourceError for a path that does not exist or
    holds nothing to read, ShardError for a damaged manifest.
    """
    if settings.format is not None:
        READERS.check(settings.format)
    sources: list[Source] = []
    for path in paths:
        if (path / MANIFEST_NAME).is_file():
            sources.append(ShardSource(path))
        else:
            found = find_sources([path], settings)
            sources += [FileSource(file, settings) for file in found.files]
            for sentence in found.not_read:
                say(sentence)
    files = [source for source in sources if isinstance(source, FileSource)]
    for source, name in zip(files, distinct_names([source.path for source in files]), strict=True):
        source.name = escaped(name)
    return sources


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return, for each path, its last parts: as many as are needed to distinguish it from all other paths."""
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


def all_items(sources: Sequence[Source], selected: ChunkFilter) -> Items:
    """Yield the items of the selected chunks of all sources; return the number of structures in all sources."""
    index = 0
    for source in sources:
        index += yield from source.items(index, selected)
    return index


def read_structure(item: Item) -> Structure:
    """Return the structure of an item; raise StructureError whatever kind of error prevents reading it."""
    try:
        return item.read()
    except (ShardError, SourceError) as error:
        raise StructureError("unreadable", str(error)) from error
