"""Requests to stop early: signals of schedulers, and the end of the time that a run may take."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What Slurm and launchers send before they kill (SIGUSR1 with `#SBATCH --signal=USR1@300`), and Ctrl-C."""
ONE_PRESS = 1.0
"""Seconds within which a Ctrl-C may arrive twice: from the terminal, and from the process that started the ranks."""


class StopRequest:
    """Whether this rank has been asked to stop; the ranks agree on it at the end of each step."""

    def __init__(self, max_hours: float, used_hours: float = 0.0, budget_seconds: float = 0.0) -> None:
        """`used_hours` of the time are over already, by tries before this one; limits of 0 are none."""
        self.reason = ""
        self.trained = 0.0
        """Seconds of steps so far, those before a resume among them."""
        self.at_the_end = False
        """Whether the reason is that the run has had its seconds, and so is over."""
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
                raise KeyboardInterrupt  # who presses again does not want to wait for a checkpoint
            self._interrupted = self._interrupted or now
        self.reason = signal.Signals(number).name

    def wanted(self) -> bool:
        """Whether this rank wants to stop after the step that it is in."""
        if not self.reason and self._until is not None and time.monotonic() > self._until:
            self.reason = f"train.max_hours = {self._max_hours:g}"
        if not self.reason and self._budget and self.trained >= self._budget:
            self.reason, self.at_the_end = f"train.budget_seconds = {self._budget:g}", True
        return bool(self.reason)
