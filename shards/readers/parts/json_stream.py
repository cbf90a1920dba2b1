"""JSON of any length, read as a stream: NaN is read as null, and depth and line lengths are bounded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.opening import plain_suffix

LINE_SUFFIXES = (".jsonl", ".ndjson")
"""Suffixes of JSON lines: one object in each line."""

MAX_DEPTH = 200
"""Largest number of lists and objects inside of each other; parsers need memory that grows with its square."""

MAX_LINE = 1 << 26
"""Largest number of bytes in a line of JSON lines."""

CHUNK = 1 << 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_TOKEN = re.compile(rb"-?(?:NaN|nan|Infinity|inf)\b")
_NOT_COUNTED = bytes(byte for byte in range(256) if byte not in b'"[]{}')
_TAIL = re.compile(rb"[-\\A-Za-z]{1,64}\Z")


def is_json_lines(path: Path) -> bool:
    """Return whether the suffix of a file says that it holds an object in each line."""
    return plain_suffix(path) in LINE_SUFFIXES


class JsonText:
    """A binary file of JSON, of which NaN is read as null and an infinite number as the text 'inf'.

    Python writes these tokens, which are not JSON, and with which a parser would reject the rest of the file.
    """

    def __init__(self, file: BinaryIO, path: Path, begin: bytes = b"") -> None:
        self._file, self._path = file, path
        self._rest = begin
        self._text = False
        self._depth = 0
        self._started = bool(begin)

    def read(self, size: int = -1) -> bytes:
        """Return some of the next bytes, or none at the end; raise SourceError where objects are nested too deeply."""
        if size == 0:
            return b""
        while True:
            more = self._file.read(CHUNK)
            data = self._rest + more
            if not self._started:
                if more and len(data) < len(BYTE_ORDER_MARK):
                    self._rest = data
                    continue
                data, self._started = data.removeprefix(BYTE_ORDER_MARK), True
            end = len(data)
            if more:
                tail = _TAIL.search(data, max(end - 64, 0))
                end = tail.start() if tail else end
                while end and data[end - 1 : end] == b"\\":
                    end -= 1
            self._rest = data[end:]
            if end or not more:
                return self._checked(data[:end])

    def _checked(self, data: bytes) -> bytes:
        """Return the data with its tokens replaced, and keep count of strings and of depth."""
        plain = _ESCAPE.sub(b"__", data) if b"\\" in data else data
        parts, place, text, counted = list[bytes](), 0, self._text, 0
        if any(token in plain for token in (b"NaN", b"nan", b"Inf", b"inf")):
            for token in _TOKEN.finditer(plain):
                text ^= plain.count(b'"', counted, token.start()) % 2 == 1
                counted = token.start()
                if not text:
                    value = b'"inf"' if b"inf" in token[0].lower() else b"null"
                    parts += [data[place : token.start()], value]
                    place = token.end()
        self._count(plain.translate(None, _NOT_COUNTED))
        return b"".join([*parts, data[place:]]) if parts else data

    def _count(self, marks: bytes) -> None:
        """Keep count of strings and of depth by the quotation marks and brackets of the data."""
        if not marks:
            return
        letters = np.frombuffer(marks, dtype=np.uint8)
        text = (np.cumsum(letters == 0x22, dtype=np.uint8) & 1) ^ self._text
        opening = (letters == 0x5B) | (letters == 0x7B)
        steps = np.where(letters == 0x22, 0, np.where(opening, 1, -1)) * (1 - text.astype(np.int64))
        depths = self._depth + np.cumsum(steps)
        if depths.max() > MAX_DEPTH:
            raise SourceError(
                f"{self._path} nests more than {MAX_DEPTH} lists and objects, so it is not a list of structures; check "
                "its format."
            )
        self._text, self._depth = bool(text[-1]), int(depths[-1])


def json_lines(file: BinaryIO, path: Path, begin: bytes = b"") -> Iterator[Any]:
    """Yield the value in each line that is not blank; a StructureError stands for a line that is not JSON.

    `begin` are bytes that have been read already. Raises SourceError for a line that is too long.
    """
    number = 0
    while line := begin if begin.endswith(b"\n") else begin + file.readline(MAX_LINE):
        begin = b""
        number += 1
        if len(line) >= MAX_LINE and not line.endswith(b"\n"):
            raise SourceError(
                f"{path}, line {number}, is longer than {MAX_LINE:,} bytes, so the file is not JSON lines; check its "
                "format."
            )
        line = line.removeprefix(BYTE_ORDER_MARK).strip()
        if not line:
            continue
        try:
            yield json.loads(line, parse_constant=lambda token: None if token == "NaN" else float(token))
        except (ValueError, RecursionError) as error:
            yield StructureError("unreadable", f"line {number} is not JSON ({str(error)[:100]})")


def list_entries(ijson: Any, file: BinaryIO, path: Path, key: str) -> Iterator[Any]:
    """Yield the items of a JSON list, or the objects of JSON lines.

    A file is one of JSON lines if its suffix says so, or if its first line is an object with `key`.
    """
    begin = file.read(1)
    while begin and (begin[-1:].isspace() or begin == BYTE_ORDER_MARK[: len(begin)]):
        begin = (b"" if begin[-1:].isspace() or begin == BYTE_ORDER_MARK else begin) + file.read(1)
    lines = is_json_lines(path)
    if begin == b"{" and not lines:
        begin += file.readline(MAX_LINE)
        try:
            first = json.loads(begin)
        except (ValueError, RecursionError):
            first = None
        lines = isinstance(first, dict) and key in first
    if lines:
        yield from json_lines(file, path, begin)
        return
    # Floats instead of decimals give the same digits as json.load.
    yield from ijson.items(JsonText(file, path, begin), "item", use_float=True)
