"""The console for tables: texts of files are shown as they are, and never as commands of the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from hydrazero.shards.text.foreign_text import escaped_lines


class PlainConsole(Console):
    """A console for which '[bold]' and ':warning:' in a text are no markup, and which writes control characters out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text, such as that of a cell, as rich draws it."""
        return super().render_str(escaped_lines(text), **options)


def plain(text: object, style: str = "") -> Text:
    """Return a text for rich, of one line or several, that is neither markup nor a command of the terminal."""
    return Text(escaped_lines(text), style=style)
