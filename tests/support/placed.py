"""Frames whose split is chosen by a test, not by the hash of their geometry."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from ase import Atoms
from sources import make_shards

from hydrazero.shards.convert.settings import SplitSection
from hydrazero.shards.convert.splits import split_of

BY_KIND = SplitSection(group="info:kind")


def in_split(split: str, frames: list[Atoms]) -> list[Atoms]:
    """Give frames a group key that falls into the split, and return them."""
    kind = next(key for n in count() if split_of((key := f"kind{n}").encode(), BY_KIND) == split)
    for atoms in frames:
        atoms.info["kind"] = kind
    return frames


def make_split_shards(folder: Path, task: str, **frames: list[Atoms]) -> Path:
    """Convert the frames of 'train', 'val' and 'test' to shards in folder/TASK; return that folder."""
    return make_shards(
        folder, task, [a for split, some in frames.items() for a in in_split(split, some)], split=BY_KIND
    )
