"""Locations of shards: a local folder, a web address, or a command that prints a file (`pipe:`)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

WEB = ("http://", "https://")
PIPE = "pipe:"
PLACE = "{}"
"""Placeholder for the name of the file in the command of a pipe."""

CHUNK = 1 << 20


def is_remote(folder: str) -> bool:
    """Return whether shards are read through webdataset, not through the file system."""
    return folder.startswith((*WEB, PIPE))


def address(folder: str, name: str) -> str:
    """Return what webdataset opens for a file of a folder: a path, a URL, or a command with '{}' replaced."""
    if folder.startswith(PIPE):
        return folder.replace(PLACE, shlex.quote(name))
    return f"{folder.rstrip('/')}/{name}"


@contextmanager
def open_at(folder: str, name: str, begin: int, end: int) -> Iterator[BinaryIO]:
    """Yield a file of a folder, opened at byte `begin`; bytes after `end` may be missing.

    Only that range is requested from a web server; the output of a pipe is read from its start. Raises whatever
    webdataset's `gopen` raises.
    """
    from webdataset.gopen import gopen, set_options  # imports PyTorch, which local manifests do not need

    url = address(folder, name)
    if folder.startswith(WEB):
        # With --fail, a missing file is an error of the pipe, not a web page that is not a tar.
        command = f"pipe:curl --fail --silent --show-error --location --range {begin}-{end - 1} {shlex.quote(url)}"
        with gopen(command) as stream:
            set_options(stream, ignore_errors=True)
            yield cast(BinaryIO, stream)
        return
    with gopen(url) as stream:
        if folder.startswith(PIPE):
            # The pipe is closed before the command has printed everything; checksums protect what it has printed.
            set_options(stream, ignore_errors=True)
            left = begin
            while left > 0 and (skipped := len(stream.read(min(left, CHUNK)))):
                left -= skipped
        else:
            stream.seek(begin)
        yield cast(BinaryIO, stream)


def read_whole(folder: str, name: str) -> bytes:
    """Return the content of a file of a remote folder; raise whatever webdataset's `gopen` raises."""
    from webdataset.gopen import gopen

    url = address(folder, name)
    command = f"pipe:curl --fail --silent --show-error --location {shlex.quote(url)}" if url.startswith(WEB) else url
    with gopen(command) as stream:
        return cast(bytes, stream.read())
