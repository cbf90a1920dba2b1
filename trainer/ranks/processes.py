"""How a process of a run ends with the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from hydrazero.trainer.ranks.distributed import exit_rank
from hydrazero.trainer.ranks.exit_status import FAILED

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let this rank be killed when the process that watches it is: two runs in one folder would spoil each other."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        exit_rank(FAILED)
