"""From named values of a structure, as keys, columns and datasets hold them, to a frame."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from ase.symbols import string2symbols

from hydrazero.shards.conditions import condition_named
from hydrazero.shards.errors import StructureError
from hydrazero.shards.readers.column_names import LABELS, column_names
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings
from hydrazero.shards.readers.symbols import numbers_of
from hydrazero.shards.text.foreign_text import escaped

OWN_NAMES = {"charge": "total_charge", "multiplicity": "spin_multiplicity"}
"""Label -> name that formats use for it, which is read where the settings name none and the usual name is absent."""


def names_in(settings: ReadSettings, there: Collection[str]) -> dict[str, str]:
    """Return part -> name in a source that holds the names `there`, with the names that formats have for a charge."""
    names = column_names(settings)
    for label, other in OWN_NAMES.items():
        chosen = label in settings.columns or label in settings.fields.model_fields_set
        if not chosen and names.get(label) not in there and other in there:
            names[label] = other
    return names


def unread_conditions(there: Mapping[str, Any], read: Collection[str], frames: int) -> dict[str, list[Any]]:
    """Return name -> its value in each frame, of what looks like a charge or a spin but is none of the names `read`.

    As fields of frames they show what a conversion leaves out. Arrays with numbers for each atom are something else.
    """
    found = {}
    for name in there:
        if condition_named(name) is None or name in read:
            continue
        try:
            values = there[name]
            # A group of an HDF5 file has no shape, and an empty dataset has None.
            if not hasattr(values, "shape") or values.shape not in ((), (1,), (frames,), (frames, 1)):
                continue
            array = np.asarray(values[()]).reshape(-1)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError):  # damaged, and nothing that is read
            continue
        if array.dtype.kind in "biufSUO":
            found[name] = (array.tolist() * frames)[:frames] if len(array) == 1 else array.tolist()
    return found


def numbers_of_symbols(value: Any) -> Any:
    """Return the atomic numbers of symbols, given as an array or list of texts or as one text ('C H H' or 'CH2').

    Any other value is returned unchanged. Raises StructureError for what is no chemical element.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise StructureError("atomic_numbers_shape", f"the atomic numbers cannot be read ({error})") from error
    items = array.reshape(-1).tolist()
    if array.dtype.kind not in "SUO" or not items or not all(isinstance(item, str | bytes) for item in items):
        return array[0] if array.ndim == 2 and len(array) == 1 else value
    texts = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in items]
    if array.ndim > 1:
        raise StructureError("atomic_numbers_shape", f"the symbols have shape {array.shape}, not (atoms,)")
    words = _words(texts[0]) if len(texts) == 1 else [text.strip("\0 ") for text in texts]
    # Arrays of texts are as long as the largest structure of a file, and end with empty places.
    while words and not words[-1]:
        words.pop()
    if words and all(word.isdecimal() and len(word) <= 3 for word in words):
        return np.array([int(word) for word in words])
    return numbers_of(words)


def _words(text: str) -> list[str]:
    """Return the symbols in a text: those between blanks or commas, or those of a formula."""
    words = [word.strip("'\"") for word in text.replace(",", " ").strip("[]() \t\r\n\0").split()]
    if len(words) != 1 or words[0].isdecimal():
        return words
    try:
        return list(string2symbols(words[0]))
    except Exception as error:  # ASE's parser of formulas raises errors of many kinds
        raise StructureError("unknown_element", f"'{escaped(text[:40])}' is neither symbols nor a formula") from error


def frame_of_parts(
    parts: Mapping[str, Any],
    source_id: str,
    maker: FrameMaker,
    *,
    info: Mapping[str, Any],
    other: Mapping[str, Any] | None = None,
) -> Frame:
    """Return the frame of named parts; a part that is missing or faulty becomes the error of the frame.

    Positions and forces may be flat lists of three numbers for each atom, or have an axis of length one in front.
    """
    try:
        numbers = numbers_of_symbols(parts.get("numbers", ()))
    except StructureError as error:
        return Frame(source_id=source_id, error=error, info=info)
    atoms = len(numbers) if np.ndim(numbers) else 0
    labels = {label: parts[label] for label in LABELS if parts.get(label) is not None}
    if "forces" in labels:
        labels["forces"] = _by_atom(labels["forces"], atoms)
    raw = RawFrame(
        numbers=numbers,
        positions=_by_atom(parts.get("positions"), atoms),
        cell=parts.get("cell"),
        pbc=parts.get("pbc"),
        **labels,
        other=other or {},
    )
    return maker.make(raw, source_id, info)


def _by_atom(value: Any, atoms: int) -> Any:
    """Return an array of three numbers for each atom as [atoms, 3], and anything else unchanged."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return value  # the conversion to numbers raises the error
    if array.shape == (3 * atoms,) or (array.ndim == 3 and array.shape == (1, atoms, 3)):
        return array.reshape(atoms, 3)
    return value
