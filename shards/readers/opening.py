"""Opening of source files, compressed or not, with the share of them that has been read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from hydrazero.shards.errors import SourceError

COMPRESSIONS: dict[str, Callable[[Any], Any]] = {".xz": lzma.open, ".bz2": bz2.open, ".gz": gzip.open}

READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)
"""What reading a file that is damaged, cut short or not of its kind raises."""


def optional_module(module: str, package: str, wanted_for: str, extra: str = "formats") -> Any:
    """Import a module of an optional package; raises SourceError that says what to install if it is not there.

    `wanted_for` begins the sentence: the file, or the format.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise SourceError(f"{wanted_for} needs the package {package}: pip install 'hydrazero[{extra}]'.") from error


def plain_suffix(path: Path) -> str:
    """Suffix of a file in small letters, that of its compression left out: '.json' for 'a.json.bz2'."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


@contextmanager
def open_binary(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], float]]]:
    """Open a file, decompressing it by its suffix; also gives a function that tells the share of it that is read.

    Raises SourceError if it cannot be opened; damage shows itself, as one of READ_ERRORS, while it is read.
    """
    try:
        raw = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise SourceError(f"source file {path} cannot be read ({error.strerror}).") from error
    with raw:
        size = max(path.stat().st_size, 1)
        unpack = COMPRESSIONS.get(path.suffix.lower())
        file = cast(BinaryIO, raw if unpack is None else unpack(raw))
        yield file, lambda: raw.tell() / size


@contextmanager
def open_text(path: Path) -> Iterator[tuple[TextIO, Callable[[], float]]]:
    """Open a text file in UTF-8 as `open_binary` does."""
    with open_binary(path) as (file, fraction):
        yield io.TextIOWrapper(file, encoding="utf-8"), fraction
