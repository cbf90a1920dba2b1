"""Opening of source files, compressed or not, and the fraction of them that has been read."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TextIO, cast

from hydrazero.shards.errors import SourceError
from hydrazero.shards.files import encoding_of
from hydrazero.shards.text.foreign_text import escaped

COMPRESSIONS: dict[str, Callable[[Any], Any]] = {".xz": lzma.open, ".bz2": bz2.open, ".gz": gzip.open}

TO_UNPACK = {
    ".zst": "unzstd {}",
    ".zstd": "unzstd {}",
    ".lz4": "unlz4 {}",
    ".lzma": "unlzma --keep {}",
    ".br": "brotli --decompress {}",
    ".z": "uncompress --keep {}",
    ".7z": "7z x {}",
    ".rar": "unrar x {}",
}
"""Suffixes of compressed files that are not read -> command that unpacks one."""

ZIP = ".zip"

BEGINNINGS = {
    ".gz": ("gzip", (b"\x1f\x8b",)),
    ".bz2": ("bzip2", (b"BZh",)),
    ".xz": ("xz", (b"\xfd7zXZ", b"]\0\0")),
    ZIP: ("zip", (b"PK",)),
}
"""Suffix -> name of a compression, and bytes with which its files begin."""

READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)
"""Errors that are raised when a file is damaged, truncated, or of another kind."""

NOT_FILES = ("__macosx", "thumbs.db", "desktop.ini")
"""Names in small letters of files and folders that systems add to others."""


def optional_module(module: str, package: str, wanted_for: str, extra: str = "formats") -> Any:
    """Return an imported module of an optional package; raise SourceError with the command that installs it.

    `wanted_for` begins that sentence, and names the file or the format.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise SourceError(f"{wanted_for} needs the package {package}: pip install 'hydrazero[{extra}]'.") from error


def plain_suffix(path: Path) -> str:
    """Return the suffix of a file in small letters, without that of a compression: '.json' for 'a.json.bz2'."""
    inner = path.with_suffix("") if path.suffix.lower() in (*COMPRESSIONS, ZIP) else path
    return inner.suffix.lower()


def is_hidden(name: str) -> bool:
    """Return whether a name is one of a hidden file or folder, or of one that a system has added."""
    return name.startswith(".") or name.lower() in NOT_FILES


@contextmanager
def open_binary(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], float]]]:
    """Yield an open file, decompressed by its suffix, and a function that returns the fraction that has been read.

    A text in UTF-16 with a byte order mark is passed on in UTF-8. Raises SourceError if the file cannot be opened.
    Damage raises one of READ_ERRORS while the file is read.
    """
    try:
        raw = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise SourceError(f"source file {path} cannot be read ({error.strerror}).") from error
    with raw:
        size = max(path.stat().st_size, 1)
        unpack = COMPRESSIONS.get(path.suffix.lower())
        yield in_utf8(raw if unpack is None else unpack(raw)), lambda: raw.tell() / size


def in_utf8(file: Any) -> BinaryIO:
    """Return a binary file whose text is in UTF-8 if it is in UTF-16 with a byte order mark; any other as it is."""
    try:
        start = file.peek(2)
    except READ_ERRORS:
        start = b""  # the reader meets the error again, and says in its own words what it could not read
    if encoding_of(start) == "utf-16":
        return cast(BinaryIO, codecs.EncodedFile(file, "utf-8", "utf-16"))
    return cast(BinaryIO, file)


@contextmanager
def open_text(path: Path) -> Iterator[tuple[TextIO, Callable[[], float]]]:
    """Yield an open text file in UTF-8 or UTF-16, otherwise as `open_binary` does.

    Its byte order mark is left out. A character in another encoding raises SourceError, which says where it is.
    """
    with open_binary(path) as (file, fraction):
        yield text_of(file, str(path)), fraction


def text_of(file: BinaryIO, where: str) -> TextIO:
    """Return a binary file as a text in UTF-8; another encoding raises SourceError, which names `where`."""
    return _Text(file, where)


MOST_OF_LINE = 16 << 20
"""Largest number of characters in a line: a file without line ends would be read into memory as a whole."""


class _Text(io.TextIOWrapper):
    """A text file in UTF-8 that says where a character in another encoding is."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        super().__init__(cast(Any, _Readable(file)), encoding="utf-8-sig")
        self._where = where

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """Return the next line; raise SourceError for one that is too long for any."""
        try:
            line = super().readline(MOST_OF_LINE if size < 0 else size)
        except UnicodeDecodeError as error:
            raise self._fault(error) from error
        if len(line) == MOST_OF_LINE:
            raise SourceError(
                f"{self._where} has a line of over {MOST_OF_LINE:,} characters, so it is not a file of structures; "
                "check its format."
            )
        return line

    def __next__(self) -> str:  # type: ignore[override]
        """Return the next line, or end."""
        if not (line := self.readline()):
            raise StopIteration
        return line

    def _fault(self, error: UnicodeDecodeError) -> SourceError:
        # The text is decoded in large pieces: the line is that of the first such character in the piece.
        before = error.object[: error.start]
        byte = error.object[error.start]
        if b"\0" in error.object:
            return SourceError(f"{self._where} cannot be read as a text, since it is binary; check its format.")
        read = cast(_Readable, self.buffer).total
        place = read - len(error.object) + error.start
        near = escaped(before.rsplit(b"\n", 1)[-1][-20:].decode("utf-8", "replace"))
        return SourceError(
            f"{self._where}: the byte 0x{byte:02x} at position {place:,} (after '{near}') is not UTF-8, so the text is "
            "in another encoding, perhaps Latin-1; convert it: iconv -f LATIN1 -t UTF-8 FILE > NEW."
        )


class _Readable(io.BufferedIOBase):
    """A binary file that counts what is read from it; files that change an encoding lack some methods of others."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.total = file, 0

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Return some of the next bytes."""
        data = self._file.read(-1 if size is None else size)
        self.total += len(data)
        return data

    def read1(self, size: int = -1, /) -> bytes:
        """Return some of the next bytes."""
        return self.read(size)


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield the path of an unpacked copy of a compressed file, in a temporary folder and without that suffix.

    A zip archive must hold one file, whose name the copy has. Raises SourceError if the file is damaged.
    """
    with TemporaryDirectory(prefix="hydrazero-") as folder:
        try:
            with _packed(path) as (packed, name):
                copy = Path(folder) / name
                with open(copy, "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
        except (*READ_ERRORS, NotImplementedError, RuntimeError) as error:  # also a zip with a password
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SourceError(f"{path} cannot be unpacked ({reason}); copy it again, or unpack it yourself.") from error
        yield copy


@contextmanager
def _packed(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield the content of a compressed file as an open file, and a name for it."""
    if path.suffix.lower() != ZIP:
        with open(path, "rb") as raw:
            yield COMPRESSIONS[path.suffix.lower()](raw), path.with_suffix("").name
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        names = [name for name in names if not any(map(is_hidden, name.split("/")))]
        if len(names) != 1:
            raise SourceError(
                f"{path} holds {len(names)} files; unpack it (unzip {path.name} -d FOLDER), and name that folder."
            )
        with archive.open(names[0]) as member:
            yield member, Path(names[0]).name


def check_compression(path: Path) -> None:
    """Raise SourceError for a file in a compression that is not read, or not in the one that its suffix names."""
    command = TO_UNPACK.get(path.suffix.lower())
    if command is not None:
        raise SourceError(
            f"source file {path} is compressed in a way that is not read; unpack it ({command.format(path.name)}), and "
            "name the unpacked file."
        )
    if path.suffix.lower() in BEGINNINGS and path.is_file() and path.stat().st_size:
        name, beginnings = BEGINNINGS[path.suffix.lower()]
        try:
            with open(path, "rb") as file:
                start = file.read(8)
        except OSError as error:
            raise SourceError(f"source file {path} cannot be read ({error.strerror}).") from error
        if not any(start.startswith(each[: len(start)]) for each in beginnings):
            raise SourceError(
                f"source file {path} is not {name}-compressed, although its name ends in {path.suffix}; rename it, or "
                "copy it again if it is damaged."
            )
