"""Locations of shards: a local folder, a web address, or a command that prints a file (`pipe:`).

A text or a path is the location of a folder or a web address. A command is a `ShardCommand`, and only a task of a run
file becomes one: arguments of commands, manifests and records of runs, which others may have written, start none.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import quote

from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.files import MOST_BYTES
from hydrazero.shards.text.names import NAME_RULE, is_name, path_fault

WEB = ("http://", "https://")
PIPE = "pipe:"
PLACE = "{}"
"""Placeholder for the name of the file in the command of a pipe."""
CURL = (
    *("curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--proto", "=http,https"),
    *("--connect-timeout", "30", "--speed-time", "120", "--speed-limit", "1"),
)
"""Command that prints what is at a web address: no other protocols, even if the server redirects to one."""
CHUNK = 1 << 20
END_WITHIN = 10.0
"""Seconds within which a command must end after its output has been closed."""


@dataclass(frozen=True, kw_only=True)
class ShardCommand:
    """A command of the user's run file that prints a file of shards; it is read by the shell."""

    line: str
    """Command line, with '{}' in place of the name of the file."""

    def __str__(self) -> str:
        return PIPE + self.line

    def for_file(self, name: str) -> str:
        """Return the command line for a file."""
        return self.line.replace(PLACE, shlex.quote(name))


Location = str | Path | ShardCommand
"""Location of shards: a folder or a web address as a text or a path, or a command."""


def location_in_run_file(text: str) -> str | ShardCommand:
    """Return the location that a task of a run file names, which the user starts: it may be a command."""
    return ShardCommand(line=text.removeprefix(PIPE)) if text.startswith(PIPE) else text


def is_remote(location: Location) -> bool:
    """Return whether shards are read from a web server or a command, not from the file system.

    Raises ConfigError for the text of a command.
    """
    if isinstance(location, ShardCommand):
        return True
    if str(location).lstrip().startswith(PIPE):
        raise ConfigError(
            f"{location}: a command (pipe:) is run only for the tasks of a run file that you start yourself; name a "
            "folder of shards instead."
        )
    return str(location).startswith(WEB)


def address(location: Location, name: str) -> str:
    """Return the path, web address or command of a file of a location; raise ConfigError for an invalid name."""
    if not is_name(name):
        raise ConfigError(f"{location} names the file {name!r}, which is not a name of a file there ({NAME_RULE}).")
    if isinstance(location, ShardCommand):
        return location.for_file(name)
    return f"{str(location).rstrip('/')}/{quote(name) if is_remote(location) else name}"


@contextmanager
def open_at(location: Location, name: str, begin: int, end: int) -> Iterator[BinaryIO]:
    """Yield a file of a location, opened at byte `begin`; bytes after `end` may be missing.

    Only that range is requested from a web server; the output of a command is read from its start. Raises ConfigError
    for an invalid name, ShardError for a local file that is not a regular file of the folder, else OSError.
    """
    where, begin, end = address(location, name), int(begin), int(end)
    if not isinstance(location, ShardCommand) and not is_remote(location):
        check_file(location, name)
        with open(where, "rb") as file:
            file.seek(begin)
            yield file
        return
    words = where if isinstance(location, ShardCommand) else [*CURL, "--range", f"{begin}-{end - 1}", "--", where]
    with _output(words) as process:
        stream = cast(BinaryIO, process.stdout)
        left = begin if isinstance(location, ShardCommand) else 0
        while left > 0 and (skipped := len(stream.read(min(left, CHUNK)))):
            left -= skipped
        # The command may be ended before it has printed everything; checksums protect what it has printed.
        yield stream


def check_file(folder: str | Path, name: str) -> None:
    """Raise ShardError unless a folder holds a regular file of this name, which does not lead out of it."""
    if (fault := path_fault(Path(folder), name)) is not None:
        raise ShardError(f"{folder}/{name} {fault}.")


def read_whole(location: Location, name: str) -> bytes:
    """Return the content of a file of a web server or a command; raise OSError if it cannot be read."""
    where = address(location, name)
    with _output(where if isinstance(location, ShardCommand) else [*CURL, "--", where]) as process:
        stream = cast(BinaryIO, process.stdout)
        content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise OSError(f"it is larger than {MOST_BYTES:,} bytes")
        status = process.wait()
    if status:
        raise OSError(f"the command ended with exit status {status}")
    return content


@contextmanager
def _output(command: str | Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process whose output is read: of a command line of the user, or of a program with its arguments."""
    process = subprocess.Popen(
        command, shell=isinstance(command, str), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=CHUNK
    )
    try:
        yield process
    finally:
        cast(BinaryIO, process.stdout).close()
        try:
            process.wait(END_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
