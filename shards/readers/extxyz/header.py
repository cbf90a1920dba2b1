"""Cell, periodicity and columns in the comment line of extended XYZ, in any case of letters; none is lost silently."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from ase.calculators.calculator import all_properties
from ase.io.extxyz import key_val_str_to_dict
from numpy.typing import NDArray

from hydrazero.shards.errors import StructureError
from hydrazero.shards.readers.extxyz.comment_line import Entry, entries
from hydrazero.shards.readers.extxyz.lookalikes import check_lookalikes, flags, numbers

_NAMES = {"lattice": "Lattice", "pbc": "pbc", "properties": "Properties"}
"""The keys with a meaning of their own: small letters -> as ASE writes them."""
_ASE_COLUMNS = ("positions", "numbers", "symbols")
"""Further names of these columns that ASE knows."""
_COLUMNS = {"species": "species", "pos": "pos", "z": "Z"}
"""The columns of symbols, positions and atomic numbers: small letters -> as ASE knows them."""
_TAKEN_IN = re.compile(r"(lattice|pbc|properties)\s*=", re.IGNORECASE)
PLAIN = "species:S:1:pos:R:3"
"""Columns of a file that states none."""


class Header:
    """The parsed comment line of a frame, as the `properties_parser` of ASE's reader returns it."""

    def __init__(self) -> None:
        self.stress: Any = None
        """The 'stress' as the file has it, since ASE would change its shape; six numbers are in the file's order."""
        self.columns: int | None = None
        """Number of words in the line of an atom, None if the file does not state it."""

    def __call__(self, line: str) -> dict[str, Any]:
        """Return the fields of the frame, with 'Lattice', 'pbc' and 'Properties' as ASE expects them.

        Raises StructureError for contradictions, and for what looks like a cell or periodicity but cannot be read.
        """
        found = list(entries(line))
        own = {name: _only(name, found) for name in _NAMES.values()}
        others = [entry for entry in found if entry.value is None or entry.key.lower() not in _NAMES]
        _check_taken_in(others, own)
        _check_quoted(found)
        for name in dict.fromkeys(entry.key for entry in others):
            _check_equal(name, [entry.value for entry in others if entry.key == name and entry.value is not None])
        check_lookalikes(others, own, line)
        info: dict[str, Any] = {}
        if own["Lattice"] is not None:
            info["Lattice"] = _lattice(own["Lattice"]).T
        if own["pbc"] is not None:
            info["pbc"] = _pbc(own["pbc"])
        info |= {entry.key: _converted(entry) for entry in others if entry.value is not None or _is_plain(entry.key)}
        if own["Properties"] is not None:
            info["Properties"], self.columns = _properties(own["Properties"])
        self.stress = info.pop("stress", None)
        return info


def _only(name: str, found: Sequence[Entry]) -> str | None:
    """Return the text of a key in any case, None if it is absent; raise StructureError for two different ones."""
    texts = [entry.value for entry in found if entry.value is not None and entry.key.lower() == name.lower()]
    _check_equal(name, texts)
    return texts[0] if texts else None


def _check_equal(name: str, texts: Sequence[str]) -> None:
    """Raise StructureError if a key has several values, of which only the last would count."""
    other = next((text for text in texts if text != texts[0]), None)
    if other is not None:
        raise StructureError(
            "header",
            f"the comment line has {name} twice, as '{texts[0][:40]}' and as '{other[:40]}'; remove one of them",
        )


def _check_taken_in(others: Sequence[Entry], own: dict[str, str | None]) -> None:
    """Raise StructureError if a text holds one of the keys that the line lacks: a quotation mark is missing."""
    for entry in others:
        for key in _TAKEN_IN.findall(entry.value or ""):
            if own[_NAMES[key.lower()]] is None:
                raise StructureError(
                    "header",
                    f"the comment line has '{key}=' inside the text of '{entry.key}'; add the value, the space or the "
                    "quotation mark that is missing before it",
                )


def _check_quoted(found: Sequence[Entry]) -> None:
    """Raise StructureError for 'pbc=T T F', of which only the first flag would count."""
    for entry, after in pairwise(found):
        if entry.key.lower() == "pbc" and entry.value is not None and after.value is None and flags(after.key):
            raise StructureError("header", 'the pbc of the comment line needs quotation marks, as in pbc="T T F"')


def _lattice(text: str) -> NDArray[np.float64]:
    """Return the lattice vectors as rows."""
    found = numbers(text)
    if found is None or len(found) != 9:
        raise StructureError(
            "header",
            f"the Lattice of the comment line must be nine numbers in quotation marks, not '{text.strip()[:60]}'",
        )
    matrix = np.array(found).reshape(3, 3)
    if "[" in text.strip().strip("[]") and not np.array_equal(matrix, matrix.T):
        raise StructureError(
            "header",
            "the Lattice of the comment line has brackets inside, which do not say whether its vectors are rows or "
            'columns; write Lattice="ax ay az bx by bz cx cy cz"',
        )
    return matrix


def _pbc(text: str) -> list[bool]:
    found = flags(text)
    if found is None:
        raise StructureError("header", f"the pbc of the comment line must be like \"T T F\", not '{text.strip()[:40]}'")
    return found


def _properties(text: str) -> tuple[str, int]:
    """Return the columns with the names that ASE knows, and their number."""
    words = text.strip().split(":")
    names, kinds, counts = words[::3], [kind.upper() for kind in words[1::3]], words[2::3]
    valid = len(words) % 3 == 0 and all(names) and all(kind in "RISL" and kind for kind in kinds)
    if not valid or not all(count.isascii() and count.isdigit() and 0 < int(count) < 10_000 for count in counts):
        raise StructureError(
            "header",
            f"the Properties of the comment line must be like '{PLAIN}' (NAME:TYPE:NUMBER, types R, I, S, L), not "
            f"'{text.strip()[:60]}'",
        )
    names = [name if name in _ASE_COLUMNS else _COLUMNS.get(name.lower(), name) for name in names]
    if len(set(names)) < len(names):
        raise StructureError("header", f"the Properties of the comment line name a column twice: '{text[:80]}'")
    if not {"pos", "positions"} & set(names) or not {"species", "Z", "symbols", "numbers"} & set(names):
        raise StructureError(
            "header", f"the Properties of the comment line lack 'species' (or 'Z') or 'pos': '{text.strip()[:80]}'"
        )
    columns = ":".join(":".join(each) for each in zip(names, kinds, counts, strict=True))
    return columns, sum(int(count) for count in counts)


def _is_plain(word: str) -> bool:
    """Return whether a word without a value is a field that is true, and not part of a sentence about a label."""
    return word.lower() not in (*_NAMES, *all_properties, "charge", "multiplicity", "virial")


def _converted(entry: Entry) -> Any:
    """Return the value of a field with the type that ASE gives it."""
    if entry.value is None:
        return True
    if entry.key.lower() == "uid":
        return entry.value
    quoted = entry.value.replace("\\", "\\\\").replace('"', '\\"')
    return key_val_str_to_dict(f'value="{quoted}"')["value"]
