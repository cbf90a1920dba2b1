"""Keys of a comment line that look like cell, periodicity or columns in a spelling that extended XYZ does not have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache

import numpy as np

from hydrazero.shards.errors import StructureError
from hydrazero.shards.readers.extxyz.comment_line import Entry
from hydrazero.shards.readers.parts.geometry import periodicity

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_LOOSE_CELL = re.compile(
    rf"(?<![a-z])((?:[a-z]+[_-])?(?:lattice|cell|box)[a-z_]*)(?:[\s:\"'“(\[{{]+{_NUMBER}[\s,;]+{_NUMBER}[\s,;]+{_NUMBER})",
    re.IGNORECASE,
)
"""'Lattice: 4 0 0 ...', without '='."""
_LOOSE_PBC = re.compile(r"(?<![a-z])(pbc)[\s:\"'“(\[{]+(?:true|false|[tf01])(?!\w)", re.IGNORECASE)
"""'pbc: T T F', without '='."""
_THREE_FLAGS = re.compile(
    r"[\"'\[{(]\s*((?:t|f|true|false)[\s,]+(?:t|f|true|false)[\s,]+(?:t|f|true|false))\s*[\"'\]})]", re.IGNORECASE
)
"""'T T F' in quotation marks or brackets, under whatever key."""
_COLUMNS = re.compile(r"\W?\w+:[RISL]:\d+(:\w+:[RISL]:\d+)*", re.IGNORECASE)
_CELL_WORDS = ("lattice", "cell", "box", "dimensions", "abc")
_WHOLE_CELL_WORDS = ("cell", "box", "unitcell", "boxsize", "boxlength", "celllength")
"""Words that are a cell even with a single number, which is the edge of a cube."""
_PERIODIC_WORDS = ("periodic", "periodicity", "isperiodic", "bc", "boundary", "boundaries", "boundaryconditions")
_VECTOR = re.compile(r"(vec|tv|a|v)_?[123]", re.IGNORECASE)
SIMILAR = 0.8
"""Ratio of difflib from which a word is a misspelling of another."""


def numbers(text: str) -> list[float] | None:
    """Return the numbers of a text, without the brackets, commas and quotation marks among them; None for a word."""
    try:
        return [float(word) for word in re.sub(r"[\[\](){}\"',;]", " ", text).split()]
    except ValueError:
        return None


def flags(text: str) -> list[bool] | None:
    """Return the three flags of a periodicity: 'T T F', '[true, true, false]', '1 1 0', 'TTF', 'T'; None for others."""
    try:
        found: list[bool] = periodicity(text, np.zeros((3, 3))).tolist()
    except StructureError:
        return None
    return found * 3 if len(found) == 1 else found


def check_lookalikes(others: Sequence[Entry], own: Mapping[str, str | None], line: str) -> None:
    """Raise StructureError for an entry that looks like one of Lattice, pbc and Properties that the line lacks.

    An entry that says no more than what holds without it is accepted, such as 'periodic=T' beside a Lattice.
    """
    if own["Lattice"] is None:
        for entry in others:
            if _is_cell(entry):
                raise _refusal(entry.key, "Lattice", 'Lattice="ax ay az bx by bz cx cy cz"')
        keys = {entry.key.lower() for entry in others if numbers(entry.value or "x") is not None}
        if {"alpha", "beta", "gamma"} <= keys:
            raise _refusal("alpha", "Lattice", 'Lattice="ax ay az bx by bz cx cy cz"')
        if loose := _LOOSE_CELL.search(line):
            raise _refusal(loose[1], "Lattice", 'Lattice="ax ay az bx by bz cx cy cz"')
    if own["pbc"] is None:
        default = [own["Lattice"] is not None] * 3
        for entry in others:
            if _is_periodicity(entry) and flags(entry.value or entry.key.lower().replace("pbc", "T")) != default:
                raise _refusal(entry.key, "pbc", 'pbc="T T F"')
        if loose := _LOOSE_PBC.search(line):
            raise _refusal(loose[1], "pbc", 'pbc="T T F"')
        if (three := _THREE_FLAGS.search(line)) and flags(three[1]) != default:
            named = [f'{entry.key}="{three[1]}"' for entry in others if three[1] in (entry.value or "")]
            raise _refusal([*named, three[1]][0], "pbc", 'pbc="T T F"')
    if own["Properties"] is None:
        for entry in others:
            similar = entry.value is not None and _alike(_letters(entry.key), "properties")
            if similar or _COLUMNS.fullmatch((entry.value or entry.key).strip()):
                raise _refusal(entry.key, "Properties", "Properties=species:S:1:pos:R:3")


def _refusal(key: str, name: str, example: str) -> StructureError:
    other = "state pbc as well" if name == "pbc" else "rename it"
    return StructureError(
        "header",
        f"the comment line has '{key[:40]}', which looks like {name} but cannot be read as it; write {example}, or "
        f"{other} if it is something else",
    )


def _letters(key: str) -> str:
    return re.sub(r"[^a-z]", "", key.lower())


@lru_cache(maxsize=1024)  # frames repeat their keys
def _alike(word: str, other: str, similar: float = SIMILAR) -> bool:
    return SequenceMatcher(None, word, other).ratio() >= similar


def _is_cell(entry: Entry) -> bool:
    letters = _letters(entry.key)
    if entry.value is None:
        return False
    if _alike(letters, "lattice"):
        return True
    found = numbers(entry.value)
    if not found:
        return False
    if len(found) == 3 and _VECTOR.fullmatch(entry.key):
        return True
    if len(found) == 9 and _alike(letters, "lattice", 0.7):
        return True
    return letters in _WHOLE_CELL_WORDS or (len(found) in (3, 6, 9) and any(word in letters for word in _CELL_WORDS))


def _is_periodicity(entry: Entry) -> bool:
    """Return whether an entry states a periodicity: by its name, or by a similar name and three flags."""
    letters, text = _letters(entry.key), (entry.value or "").strip().lower()
    if entry.value is None:
        return letters.startswith("pbc")
    if letters.startswith("pbc") or letters.endswith("pbc"):
        return True
    if letters in _PERIODIC_WORDS or letters.startswith("periodicboundary"):
        # 'boundary=grain' is no periodicity, 'boundary="p p f"' of LAMMPS is.
        return flags(text) is not None or re.fullmatch(r"([pfsm]{1,2}\s*){3}|yes|no|none", text) is not None
    # 'Pb="1 0 0"' may be a number of atoms of lead.
    near = len(letters) in (2, 3, 4) and len(set("pbc") & set(letters)) >= 2 and (letters != "pb" or "t" in text)
    return near and flags(text) is not None and len(re.sub(r"[\W_]", " ", text).split()) == 3
