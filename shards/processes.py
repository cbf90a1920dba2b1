"""Processes that end when the process that started them ends, however that happens."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing import parent_process
from threading import Thread

PR_SET_PDEATHSIG = 1
"""Number of the option of Linux's prctl that sends a process a signal when its parent ends."""


def kill_with_parent() -> None:
    """Let Linux kill this process when the thread that started it ends; without effect on other systems.

    It may be called between fork and exec, as the `preexec_fn` of a subprocess.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent(parent: int, status: int) -> None:
    """Let this process be killed when its parent ends; end it with `status` if process `parent` has ended already."""
    kill_with_parent()
    if os.getppid() != parent:
        os._exit(status)


def end_with_creator() -> None:
    """Let a process made by `multiprocessing` end when the process that made it ends.

    A thread waits for that end, since the creator need not be the parent process: a fork server may stand between
    them. Nor does `kill_with_parent` help: the thread of the creator that forks may end long before the creator.
    """
    creator = parent_process()
    if creator is None:
        return

    def watch() -> None:
        creator.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
