"""The comment line of extended XYZ as keys and texts: KEY=VALUE, with quotation marks or brackets around spaces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hydrazero.shards.errors import StructureError

_PIECE = re.compile(
    r"""
    (?P<space>\s+)
    | (?P<equals>=)
    | \\(?P<escaped>.)
    | "(?P<double>(?:\\.|[^"\\])*)"
    | '(?P<single>(?:\\.|[^'\\])*)'
    | \{(?P<braces>(?:\\.|[^}\\])*)\}
    | \[(?P<brackets>(?:\\.|\[[^\[\]]*\]|[^\[\]\\])*)\]
    | (?P<open>["'{\[])
    | (?P<plain>(?:[^\s=\\"'{\[]|(?<=\w)'(?=\w))+|\\)  # an apostrophe inside a word is a letter of it
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A key of a comment line."""

    key: str
    value: str | None
    """Text after '=', without quotation marks or brackets around it; None for a word without '='."""


def entries(line: str) -> Iterator[Entry]:
    """Yield the keys of a comment line in their order.

    Raises StructureError where a quotation mark or a bracket takes other keys into its text.
    """
    current: list[str | None] = [None]
    found: list[list[str | None]] = []
    for piece in _PIECE.finditer(line):
        kind = piece.lastgroup or ""
        if kind == "space":
            # Spaces may stand around '='.
            if current[-1] is not None:
                found.append(current)
                current = [None]
        elif kind == "equals":
            if current == [None] and found:
                current = found.pop()
            current.append(None)
        elif kind == "open":
            _check_open(piece[0], current, line, piece.end())
        else:
            text = piece[kind]
            if kind in ("double", "single"):
                _check_quoted(text, current)
            current[-1] = (current[-1] or "") + _ESCAPE.sub(r"\1", text)
    found.append(current)
    for key, *values in found:
        if key:
            yield Entry(key=key, value="=".join(value or "" for value in values) if values else None)


def _check_open(mark: str, current: list[str | None], line: str, place: int) -> None:
    """Raise StructureError for a mark without its other half, unless it is an apostrophe or bracket of plain text."""
    rest = line[place:]
    begins_a_value = len(current) > 1 and not current[-1]
    if begins_a_value or "=" in rest or (mark == '"' and "=" in line):
        after = f"after '{current[0]}='" if begins_a_value else f"in '{line[max(place - 20, 0) : place + 20].strip()}'"
        raise StructureError("header", f"the comment line has {mark} {after} without its other half")


def _check_quoted(text: str, current: list[str | None]) -> None:
    """Raise StructureError for a quoted text that begins inside a word and holds a key: two marks are displaced."""
    begins_a_value = len(current) > 1 and not current[-1]
    if "=" in text and not begins_a_value:
        raise StructureError("header", f"the comment line has '{text.strip()[:30]}' between displaced quotation marks")
