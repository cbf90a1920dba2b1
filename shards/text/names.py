"""Names that become files and folders: tasks, shards, files of a checkpoint, members of archives.

Files from other people hold such names, so each is checked where it is read: a name is one word of a path, and what it
names is a regular file inside its folder.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.text.foreign_text import escaped

NAME = re.compile(r"[^\s./\\-][^/\\]*(?<!\s)")
"""A name: one part of a path that is not hidden, cannot be taken for an option, and does not lead anywhere else."""
MOST_BYTES = 200
"""Largest number of bytes of a name in UTF-8; file systems accept 255, endings of files included."""
NAME_RULE = (
    "a name holds no '/', no backslash and no control characters, does not begin with '.', '-' or a space, and has "
    f"{MOST_BYTES} bytes at most"
)


def is_name(text: object) -> bool:
    """Return whether a value is a name that can be a file or a folder of its own, and nothing else."""
    if not isinstance(text, str) or NAME.fullmatch(text) is None or escaped(text) != text:
        return False
    return len(text.encode()) <= MOST_BYTES


def check_name(text: object, what: str) -> str:
    """Return a name, which `what` describes in messages; raise ConfigError if it is invalid."""
    if not is_name(text):
        raise ConfigError(f"{what} {text!r} cannot be used as the name of a file: {NAME_RULE}.")
    return str(text)


def _checked(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"{text!r} cannot be used as the name of a file: {NAME_RULE}.")
    return text


def is_plain(text: str) -> bool:
    """Return whether a text is one line that terminals and files can hold: no control characters, no surrogates."""
    plain = text.replace("\t", " ")
    return escaped(plain) == plain


def check_plain(text: str, what: str) -> str:
    """Return a text that becomes part of a line; raise ConfigError, which names it by `what`, if it is not one line."""
    if not is_plain(text):
        raise ConfigError(f"{what} {text!r} holds a line break or another control character; leave it out.")
    return text


def _one_line(text: str) -> str:
    if not is_plain(text):
        raise ValueError(f"{text!r} holds a line break or another control character; leave it out.")
    return text


OneLine = Annotated[str, AfterValidator(_one_line)]
"""A text of a settings file that becomes part of a line."""
FileName = Annotated[str, Field(min_length=1), AfterValidator(_checked)]
"""A text of a settings file that becomes the name of a file or folder."""


def path_fault(folder: Path, name: str) -> str | None:
    """Return why `folder`/`name` is not a regular file inside the folder, as the end of a sentence; None if it is one.

    The folder itself may be a symbolic link, and so may a file in it, if it leads to another file of the folder. The
    file is not opened: to open a FIFO would wait for its writer.
    """
    if not all(is_name(part) for part in name.split("/")):
        return f"is not a name of a file in a folder ({NAME_RULE})"
    path = folder / name
    try:
        resolved = Path(os.path.realpath(path, strict=True))
        mode = resolved.stat().st_mode
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not resolved.is_relative_to(os.path.realpath(folder)):
        return "is a symbolic link that leads out of its folder; copy the file itself there"
    return None if stat.S_ISREG(mode) else "is not a regular file"
