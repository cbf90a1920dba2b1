"""Where shards lie: a local folder, a web address, or a command that prints a file (`pipe:`)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

WEB = ("http://", "https://")
PIPE = "pipe:"
PLACE = "{}"
"""Stands in a pipe's command for the name of the file."""

CHUNK = 1 << 20


def is_remote(folder: str) -> bool:
    """Whether shards are opened through webdataset, not through the file system."""
    return folder.startswith((*WEB, PIPE))


def address(folder: str, name: str) -> str:
    """Return what webdataset opens for a file of a folder: a path, an URL, or a command with '{}' replaced."""
    if folder.startswith(PIPE):
        return folder.replace(PLACE, shlex.quote(name))
    return f"{folder.rstrip('/')}/{name}"


@contextmanager
def open_at(folder: str, name: str, begin: int, end: int) -> Iterator[BinaryIO]:
    """Open a file of a folder at byte `begin`; what comes after `end` may be missing.

    From a web server only that range is asked for; the output of a pipe is read from its start. Raises what
    webdataset's `gopen` raises.
    """
    from webdataset.gopen import gopen, set_options  # it imports PyTorch, without which a local manifest is read

    url = address(folder, name)
    if folder.startswith(WEB):
        # curl's own --fail turns a missing file into an error of the pipe, not into a page that is no tar.
        command = f"pipe:curl --fail --silent --show-error --location --range {begin}-{end - 1} {shlex.quote(url)}"
        with gopen(command) as stream:
            set_options(stream, ignore_errors=True)
            yield cast(BinaryIO, stream)
        return
    with gopen(url) as stream:
        if folder.startswith(PIPE):
            # The command is left before it has printed everything; what it printed is held to its checksum.
            set_options(stream, ignore_errors=True)
            left = begin
            while left > 0 and (skipped := len(stream.read(min(left, CHUNK)))):
                left -= skipped
        else:
            stream.seek(begin)
        yield cast(BinaryIO, stream)


def read_whole(folder: str, name: str) -> bytes:
    """Return a file of a remote folder; raises what webdataset's `gopen` raises."""
    from webdataset.gopen import gopen

    url = address(folder, name)
    command = f"pipe:curl --fail --silent --show-error --location {shlex.quote(url)}" if url.startswith(WEB) else url
    with gopen(command) as stream:
        return cast(bytes, stream.read())
