"""Text that others may have written (names, comments, messages from files), for terminals, tables, plots and pages.

Such text can hold terminal escapes, markup of the program that shows it, or surrogates, which no file can hold.
Whatever shows text of a file passes it through one of these functions; tables go through `shards.text.terminal`.
"""

from __future__ import annotations

import html
import re
import unicodedata

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that are not shown as themselves: control, format (such as those that reverse the
reading direction), surrogates, line and paragraph separators."""


def escaped(text: object) -> str:
    r"""Return a text on one line in which characters that are not shown as themselves are written like '\x1b'."""
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_written(letter) if unicodedata.category(letter) in HIDDEN else letter for letter in shown)


def excerpt(text: str, most: int = 40) -> str:
    """Return the beginning of a text for a quotation, as in `escaped`; a repeated control character is shown once."""
    return escaped(re.sub(r"([\x00-\x1f\x7f-\x9f])\1{2,}", r"\1…", text[:most]))


def escaped_lines(text: object) -> str:
    """Return a text in which line breaks and tabs stay, and everything else is as in `escaped`."""
    return "".join(part if part in ("\n", "\t") else escaped(part) for part in re.split(r"([\n\t])", str(text)))


def escaped_json(text: str) -> str:
    r"""Return a JSON text in which hidden characters, which can only be in its strings, are written like '\u001b'."""
    return "".join(map(_json_written, text))


def _written(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _json_written(letter: str) -> str:
    if letter in "\n\t" or unicodedata.category(letter) not in HIDDEN:
        return letter
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place : place + 2].hex()}" for place in range(0, len(units), 2))


def echo(text: object, *, err: bool = False) -> None:
    """Print a text, which may have several lines, to the standard output, or to that of errors."""
    import click

    click.echo(escaped_lines(text), err=err)


def for_plot(text: object) -> str:
    """Return a text for matplotlib, which takes what is between two dollar signs for a formula."""
    return escaped_lines(text).replace("$", r"\$")


def for_html(text: object) -> str:
    """Return a text for HTML, attributes in quotes included."""
    return html.escape(escaped_lines(text))
