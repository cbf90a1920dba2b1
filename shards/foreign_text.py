"""Text that others may have written (names, comments, messages from files), for terminals, tables, plots and pages.

Such text can hold terminal escapes, markup of the program that shows it, or halves of characters that no file can hold.
Whatever shows text of a file passes it through one of these functions.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of letters that are not shown as themselves: control, format (such as those that turn the reading
direction round), halves of characters, line and paragraph separators."""


def escaped(text: object) -> str:
    r"""Return a text on one line in which letters that are not shown as themselves are written like '\x1b'."""
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_written(letter) if unicodedata.category(letter) in HIDDEN else letter for letter in shown)


def _written(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def for_table(text: object) -> Text:
    """Return a text for a cell of rich's tables, in which '[bold]' and ':warning:' are no markup."""
    from rich.text import Text

    return Text(escaped(text))


def for_markup(text: object) -> str:
    """Return a text to be put into rich's markup."""
    from rich.markup import escape

    return escape(escaped(text))


def for_plot(text: object) -> str:
    """Return a text for matplotlib, which takes what is between two dollar signs for a formula."""
    return escaped(text).replace("$", r"\$")


def for_html(text: object) -> str:
    """Return a text for HTML, attributes in quotes included."""
    return html.escape(escaped(text))


def for_markdown(text: object) -> str:
    """Return a text for Markdown, cells of tables included."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$<>&])", r"\\\1", escaped(text))
