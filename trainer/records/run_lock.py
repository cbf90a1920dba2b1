"""Locks of the folders that processes write: a second process is refused, with the name of the first."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.files import NoLocksError, lock_holder, try_lock

RUN_LOCK = ".run.lock"
"""Lock of a run folder, which rank 0 holds while the run trains."""
WAIT = 10.0
"""Seconds until a folder counts as in use: a process that has just been killed may still be ending."""
POLL = 0.2
"""Seconds between attempts."""


@contextlib.contextmanager
def folder_in_use(folder: Path, name: str, what: str) -> Iterator[str | None]:
    """Hold the lock `name` in a folder, which is made if need be, and removed at the end if it is empty.

    Yields None, or a warning if the file system has no locks. The system releases the lock when the process ends,
    however that happens. Raises ConfigError if another process holds the lock, or if the folder cannot be written;
    `what` says in it what the folder is.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{what} {folder} cannot be written ({error.strerror}); free some space there, or choose another folder."
        ) from error
    until = time.monotonic() + WAIT
    try:
        while (lock := try_lock(path)) is None:
            if time.monotonic() > until:
                raise ConfigError(
                    f"{what} {folder} is in use by {lock_holder(path)}; wait until that process has ended, stop it, or "
                    "choose another folder."
                )
            time.sleep(POLL)
    except NoLocksError:
        yield (
            f"warning: the file system of {folder} has no locks, so nothing prevents another process from writing "
            f"there; make sure that no other one uses the {what}."
        )
        return
    try:
        with lock:
            try:
                yield None
            finally:
                path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # it holds files
            folder.rmdir()
