"""Troubleshooting quotes messages as the code prints them: the fixed words of each heading occur in the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
CODE = ("shards", "models", "trainer", "launch")
SHORT = 4
"""Fragments of a message of fewer characters than this occur everywhere."""


def quotes() -> list[str]:
    """Return the quoted messages of the headings, `…` in place of what varies."""
    return [
        quote
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("### ")
        for quote in re.findall(r"`([^`]+)`", line)
    ]


@cache
def texts() -> str:
    """Return all strings of the code, an f-string's parts one by one."""
    found = []
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [
                node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            found += [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return "\0".join(found)


def test_there_are_quotes():
    assert len(quotes()) > 30


@pytest.mark.parametrize("quote", quotes())
def test_quoted_messages_are_those_of_the_code(quote):
    for part in quote.split("…"):
        fixed = part.strip()
        assert len(fixed) < SHORT or fixed in texts(), f"no message of the code holds '{fixed}'"
