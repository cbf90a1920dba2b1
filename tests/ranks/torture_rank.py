"""Program of each rank in torture.py: hydrazero.trainer.train, which records its activity in a file.

The first argument is the file. It holds the number of steps that this process has begun, and 'step', 'evaluation',
'checkpoint', 'loading' or 'between'.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from hydrazero.trainer import loop, train


class ActivityFile:
    """A file of one short line, which is overwritten in place."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.steps = 0
        self.write("start")

    def write(self, doing: str) -> None:
        os.pwrite(self.file, f"{self.steps:6d} {doing:12s}".encode(), 0)


def record_calls(module: Any, name: str, doing: str, file: ActivityFile) -> None:
    """Replace a function of a module by one that records the activity while it runs."""
    function: Callable[..., Any] = getattr(module, name)

    @functools.wraps(function)
    def recorder(*arguments: Any, **named: Any) -> Any:
        file.steps += doing == "step"
        file.write(doing)
        try:
            return function(*arguments, **named)
        finally:
            file.write("between")

    setattr(module, name, recorder)


if __name__ == "__main__":
    file = ActivityFile(sys.argv.pop(1))
    record_calls(loop, "train_step", "step", file)
    record_calls(loop, "validate", "evaluation", file)
    record_calls(loop, "save_checkpoint", "checkpoint", file)
    record_calls(train, "load_checkpoint", "loading", file)
    train.main()
