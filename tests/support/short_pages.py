"""Changes that let tests run the commands and files of the README and the manual with few steps."""

from __future__ import annotations

import re

CHANGES = (
    (r"steps = \d+", "steps = 4"),
    (r"--steps \d+", "--steps 4"),
    (r"train\.steps=\d+", "train.steps=6"),
    (r"(hydrazero train \S+\.toml)(?!.*train\.steps)", r"\1 --set train.steps=4"),
    (r"--train \d+", "--train 10"),
    (r"--hours 0\.\d+", "--hours 0.002"),
    (r"--trials \d+ --workers \d+", "--trials 1"),
    (r"\bseconds = \d+", "seconds = 0.5"),
    (r"rungs = \d+", "rungs = 1"),
    (r"STRUCTURES = \d+", "STRUCTURES = 40"),
)
"""Patterns and their replacements."""


def shorter(text: str) -> str:
    """Return the text of a command or a file, changed to few steps, trials and structures."""
    for pattern, replacement in CHANGES:
        text = re.sub(pattern, replacement, text)
    return text
