"""Requests to stop early: signals of schedulers and users, and time limits of the run."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals of Slurm and of launchers before they kill (SIGUSR1 with `#SBATCH --signal=USR1@300`), and of Ctrl-C."""
ONE_PRESS = 1.0
"""Seconds within which one Ctrl-C may arrive twice: from the terminal, and from the process that started the ranks."""


class StopRequest:
    """Request to stop, made to this rank; the ranks exchange their requests at the end of each step."""

    def __init__(self, max_hours: float, used_hours: float = 0.0, budget_seconds: float = 0.0) -> None:
        """Set the limits; 0 stands for no limit. Earlier attempts have used up `used_hours` of `max_hours`."""
        self.reason = ""
        """Signal or setting that has asked to stop; empty if none has."""
        self.trained = 0.0
        """Seconds spent in steps so far, including those before a resume."""
        self.at_the_end = False
        """Whether the run has used up `budget_seconds`, and so is complete."""
        self._budget = budget_seconds
        self._until = time.monotonic() + 3600 * (max_hours - used_hours) if max_hours else None
        self._max_hours = max_hours
        self._before: dict[signal.Signals, Any] = {}
        self._interrupted: float | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > ONE_PRESS:
                raise KeyboardInterrupt  # a second Ctrl-C means that the user does not want to wait for a checkpoint
            self._interrupted = self._interrupted or now
        self.reason = signal.Signals(number).name

    def wanted(self) -> bool:
        """Return whether this rank has been asked to stop after the present step."""
        if not self.reason and self._until is not None and time.monotonic() > self._until:
            self.reason = f"train.max_hours = {self._max_hours:g}"
        if not self.reason and self._budget and self.trained >= self._budget:
            self.reason, self.at_the_end = f"train.budget_seconds = {self._budget:g}", True
        return bool(self.reason)
