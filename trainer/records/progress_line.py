"""The progress of a run: one line that is updated on a terminal, or a new line from time to time in a file."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from hydrazero.shards.text.terminal import PlainConsole

EVERY = 30.0
"""Seconds between lines where there is no terminal; the log of a day then has some 3,000 lines."""
FILE_WIDTH = 160
"""Width in characters where there is no terminal, so that tables are not cut off."""


def wide_console(*, stderr: bool) -> PlainConsole:
    """Return a console that is wide enough for tables even if it is not a terminal."""
    console = PlainConsole(stderr=stderr)
    return console if console.is_terminal else PlainConsole(stderr=stderr, width=FILE_WIDTH)


def duration(seconds: float | None) -> str:
    """Return a time as h:mm:ss, or dashes if it is not known."""
    if seconds is None:
        return "-:--:--"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class _Left(ProgressColumn):
    """Column that shows the remaining time."""

    def __init__(self, line: ProgressLine) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._line = line

    def render(self, task: Task) -> Text:
        return Text(f"{duration(self._line.left())} left", style="progress.remaining")


class ProgressLine:
    """Progress of a run from step `start`: rate, fraction of the time spent waiting for data, loss, remaining time."""

    def __init__(self, console: PlainConsole, start: int, total: int) -> None:
        self.console = console
        self.step, self.total = start, total
        self.loss = self.rate = ""
        self._first: tuple[int, float] | None = None
        """Number of the first step that was done, and the clock at its end."""
        self._shown = time.monotonic() - EVERY
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[rate]}{task.fields[loss]}"),
                _Left(self),
                console=self.console,
                refresh_per_second=2,
                expand=True,
            )
            self._bar = self._progress.add_task("", total=total, completed=start, rate="", loss="")
            self._progress.start()

    def left(self) -> float | None:
        """Return the remaining seconds, estimated from the steps after the first one, which may compile.

        Evaluations and checkpoints count. Return None before the second step.
        """
        if self.step == self.total:
            return 0.0
        if self._first is None or self.step == self._first[0]:
            return None
        step, since = self._first
        return (self.total - self.step) * (time.monotonic() - since) / (self.step - step)

    def say(self, sentence: str) -> None:
        """Print one line."""
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int, loss: float) -> None:
        """Show that a step is done."""
        self.step, self.loss = step, f"loss {loss:.4g}"
        self._first = self._first or (step, time.monotonic())
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, loss=self.loss)

    def interval(self, structures_per_s: float, data_wait_share: float) -> None:
        """Show the rate of the last interval; in a file, print a line if the last line is old enough."""
        self.rate = f"{structures_per_s:.0f} structures/s, waits {100 * data_wait_share:.0f}%, "
        if self._progress is not None:
            self._progress.update(self._bar, rate=self.rate)
        elif time.monotonic() - self._shown > EVERY or self.step == self.total:
            self._shown = time.monotonic()
            self.say(f"step {self.step:,}/{self.total:,}: {self.rate}{self.loss}, {duration(self.left())} left")

    def stop(self) -> None:
        """Stop updating the line."""
        if self._progress is not None:
            self._progress.stop()
