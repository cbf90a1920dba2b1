"""Pages run with few steps: what a test changes in the commands and files of the README and of the manual."""

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
"""Pattern -> what a test runs instead."""


def shorter(text: str) -> str:
    """Return a command or a file with few steps, trials and structures."""
    for pattern, replacement in CHANGES:
        text = re.sub(pattern, replacement, text)
    return text
