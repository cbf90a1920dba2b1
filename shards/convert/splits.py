"""Assignment of frames to splits by a hash of their group, independent of the order and of the other frames."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from ase.symbols import Symbols

from hydrazero.shards.convert.settings import SplitSection
from hydrazero.shards.errors import StructureError
from hydrazero.shards.graphs.neighbours import half_pairs
from hydrazero.shards.readers.frames import Frame
from hydrazero.shards.structure import Structure


def group_key(frame: Frame, structure: Structure, group: str) -> bytes:
    """Return the key of a frame's group; raise StructureError if the frame lacks the field that `group` names."""
    if group == "geometry":
        return structure.geometry_hash()
    if group == "composition":
        return str(Symbols(structure.numbers).get_chemical_formula()).encode()
    if group == "file":
        return frame.source_id.rpartition("#")[0].encode()
    name = group.removeprefix("info:")
    if name not in frame.info:
        raise StructureError("no_group", f"the frame has no field '{name}', which split.group names")
    return str(frame.info[name]).encode()


def is_selected(info: Mapping[str, Any], select: Mapping[str, Sequence[Any]]) -> bool:
    """Return whether the fields of a frame have one of the wanted values each; numbers compare as numbers."""
    return all(key in info and _is_one_of(info[key], choices) for key, choices in select.items())


def unwanted_values(info: Mapping[str, Any], select: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the fields of a frame whose values are not among those that are wanted of them."""
    held = {key: choices for key, choices in select.items() if key in info}
    return {key: _single(info[key]) for key, choices in held.items() if not _is_one_of(info[key], choices)}


def _is_one_of(value: Any, choices: Sequence[Any]) -> bool:
    return any(_equal(_single(value), wanted) for wanted in choices)


def _single(value: Any) -> Any:
    """Return bytes as a text, and an array of one value as that value."""
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        one = value.reshape(-1)[0]
        # The shortest number that rounds to a float32 is the one that was written.
        value = float(str(one)) if one.dtype == np.float32 else one.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _equal(value: Any, wanted: Any) -> bool:
    if str(value) == str(wanted):
        return True
    if (isinstance(value, str) and isinstance(wanted, str)) or (isinstance(value, int) and isinstance(wanted, int)):
        return False
    number = _number(value)
    return number is not None and number == _number(wanted)


def _number(value: Any) -> float | None:
    """Return a number, or the number in a text; None for anything else, such as a flag."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def split_of_file(source: Path, settings: SplitSection) -> str | None:
    """Return the split that the settings name for all frames of a source, or None."""
    for split, patterns in (("val", settings.val_files), ("test", settings.test_files)):
        if any(fnmatch(str(source), pattern) for pattern in patterns):
            return split
    return None


LONE_DISTANCE = 6.0
"""Distance in Å within which an isolated atom has no neighbour, where the settings name no distance."""


def is_isolated_atom(structure: Structure, cutoffs: Sequence[float]) -> bool:
    """Return whether a structure is a single atom without a neighbour within the largest of the cutoffs, in Å.

    It may stand in a large periodic box, since codes with plane waves know no other isolated atom.
    """
    if len(structure) != 1 or not structure.pbc.any():
        return len(structure) == 1
    within = max(cutoffs, default=LONE_DISTANCE)
    return not len(half_pairs(structure.positions, structure.cell, structure.pbc, within).first)


def split_of(key: bytes, settings: SplitSection) -> str:
    """Return 'train', 'val' or 'test' for a group key, with the fractions of the settings as probabilities."""
    digest = hashlib.blake2b(key, digest_size=8, salt=str(settings.seed).encode()[:16]).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < settings.train:
        return "train"
    return "val" if place < settings.train + settings.val else "test"
