"""Run by torture.py on every rank, as hydrazero.trainer.train is, but noting in a file what it is doing.

The first argument is the file: how many steps this process has begun, and 'step', 'evaluation', 'checkpoint', 'loading'
or 'between'.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from hydrazero.trainer import loop, train


class Note:
    """The file, of one short line, overwritten in place."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.steps = 0
        self.write("start")

    def write(self, doing: str) -> None:
        os.pwrite(self.file, f"{self.steps:6d} {doing:12s}".encode(), 0)


def noted(module: Any, name: str, doing: str, note: Note) -> None:
    """Let a function of a module be noted while it runs."""
    function: Callable[..., Any] = getattr(module, name)

    @functools.wraps(function)
    def noting(*arguments: Any, **named: Any) -> Any:
        note.steps += doing == "step"
        note.write(doing)
        try:
            return function(*arguments, **named)
        finally:
            note.write("between")

    setattr(module, name, noting)


if __name__ == "__main__":
    note = Note(sys.argv.pop(1))
    noted(loop, "train_step", "step", note)
    noted(loop, "validate", "evaluation", note)
    noted(loop, "save_checkpoint", "checkpoint", note)
    noted(train, "load_checkpoint", "loading", note)
    train.main()
