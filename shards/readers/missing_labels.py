"""The sentence on a label that a frame lacks, with the fields that could be it and how to name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import numpy as np

from hydrazero.shards.errors import StructureError

MOST = 8
"""Largest number of fields in the sentence."""
_GEOMETRY = ("numbers", "positions", "cell", "pbc")
_LIKELY = {
    "energy": r"energ|^(e|u|u0|e0|etot|e_tot|toten|epot|e_pot|e_dft)$",
    "forces": r"force|grad|^(f|frc)$",
    "stress": r"stress|virial|press|sigma",
    "charge": r"charge|^q$",
    "multiplicity": r"multiplicity|spin|^mult$",
}
"""Label -> pattern of the names, in small letters, that fields with the label usually have."""
_UNLIKELY = r"kin|atom|form|hull|free|zero|zpe|bind|ads|std|spread|error|correct|initial"
"""Pattern of names that are less likely than the others."""
_OTHER = r"kin|atom|form|hull|zero_point|zpe|bind|ads|std|spread|error|correct"
"""Pattern of names of other quantities, which are listed but never suggested."""


def missing_label(label: str, name: str, fields: Mapping[str, Any], atoms: int, *, because: str = "") -> StructureError:
    """Return the error on a frame without a label that is expected in the field `name`.

    `because` says why what is in this field does not count. Fields whose shape fits are listed, and the likely one is
    suggested.
    """
    text = f"the frame has no {label} (field '{name}')" + (
        f", since the numbers there are {because}" if because else ""
    )
    found = [field for field, value in fields.items() if field != name and _fits(label, field, value, atoms)]
    likely = sorted(filter(lambda field: _rank(label, field) < 2, found), key=lambda field: _rank(label, field))
    # Another label of the settings is most often named as that.
    listed = [*likely, *(field for field in found if field not in likely)][:MOST]
    if listed and not because:
        names = ", ".join(f"'{field}'" for field in listed)
        best = next((field for field in likely if not re.search(_OTHER, field.lower())), "...")
        text += f'; it has {names}: name the right one as [fields] {label} = "{best}" in the file given with --config'
        if label == "forces" and "grad" in best.lower():
            text += " (with a minus sign in the unit of forces, for a gradient)"
    elif not because and fields:
        text += ", and no other field could be it"
    if label != "energy":
        start = ", or," if listed and not because else ";"
        text += f"{start} if frames may lack it, leave '{label}' out of [labels] require"
    return StructureError(f"no_{label}", text)


@lru_cache(maxsize=4096)  # frames repeat their fields, and millions of them may lack a label
def _rank(label: str, field: str) -> int:
    """Return 0 for a name that the label usually has, 1 for a less likely one, 2 for any other name."""
    misspelt = SequenceMatcher(None, field.lower(), label).ratio() >= 0.75
    if not misspelt and not re.search(_LIKELY.get(label, "(?!)"), field.lower()):
        return 2
    return int(bool(re.search(_UNLIKELY, field.lower())))


def _fits(label: str, field: str, value: Any, atoms: int) -> bool:
    """Return whether a field has the shape of a label, and numbers."""
    if field in _GEOMETRY:
        return False
    try:
        array = np.asarray(value)
    except ValueError:
        return False
    if array.dtype.kind not in "iuf" or (array.dtype.kind == "f" and np.isnan(array).all()):
        return False
    if label == "forces":
        return array.shape == (atoms, 3)
    if label == "stress":
        return array.shape in ((3, 3), (9,), (6,))
    if label in ("energy", "charge", "multiplicity"):
        return array.size == 1 and (label == "energy" or bool(np.all(array == np.round(array))))
    return True
