"""Opening of source files, compressed or not, and the fraction of them that has been read."""

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
"""Errors that are raised when a file is damaged, truncated, or of another kind."""


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
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


@contextmanager
def open_binary(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], float]]]:
    """Yield an open file, decompressed by its suffix, and a function that returns the fraction that has been read.

    Raises SourceError if the file cannot be opened. Damage raises one of READ_ERRORS while the file is read.
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
    """Yield an open text file in UTF-8, otherwise as `open_binary` does."""
    with open_binary(path) as (file, fraction):
        yield io.TextIOWrapper(file, encoding="utf-8"), fraction
