"""Cells and periodicity in the forms in which files hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.geometry import cellpar_to_cell
from numpy.typing import NDArray

from hydrazero.shards.errors import StructureError
from hydrazero.shards.text.foreign_text import escaped

FLAGS = {
    **dict.fromkeys(("t", "true", ".true.", "1", "1.0", "yes", "p"), True),
    **dict.fromkeys(("f", "false", ".false.", "0", "0.0", "no"), False),
}
"""Words that stand for a flag."""

SMALLEST_ANGLE = 5.0
"""Angle in degrees below which six numbers are no lengths and angles of a cell."""


def numbers_in(value: Any, name: str) -> NDArray[np.float64]:
    """Return an array of float64; raise StructureError for what holds no real numbers, such as words."""
    try:
        found = np.asarray(value)
        if found.dtype.kind in "cbmMV":
            raise StructureError(f"{name}_shape", f"the {name} holds values of the type {found.dtype}, not numbers")
        return found.astype(np.float64)
    except StructureError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise StructureError(f"{name}_shape", f"the {name} cannot be read as numbers: {_why(value)}") from error


def _why(value: Any) -> str:
    """Return why a value holds no numbers: its first item that is not a number, or parts of different shapes."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list | tuple) or (isinstance(item, np.ndarray) and item.ndim):
            waiting += list(item)[::-1]
            continue
        try:
            float(item)
        except (TypeError, ValueError, OverflowError):
            return f"'{escaped(str(item))[:60]}' is not a number"
    return "its parts have different shapes"


def cell_matrix(value: Any, length: float) -> NDArray[np.float64]:
    """Return a cell [3, 3] in Å, its vectors as rows; zeros where the file has none.

    `value` holds nine numbers, three lengths of a right-angled cell, three lengths and three angles in degrees, or
    nothing; `length` is the factor of its lengths to Å. Raises StructureError for anything else.
    """
    if value is None:
        return np.zeros((3, 3))
    found = numbers_in(value, "cell")
    flat = found.reshape(-1)
    single = sum(size != 1 for size in found.shape) <= 1
    if not flat.size:
        return np.zeros((3, 3))
    if flat.size == 9 and (single or found.shape[-2:] == (3, 3)):
        return length * flat.reshape(3, 3)
    if flat.size == 3 and single:
        return length * np.diag(flat)
    if flat.size == 6 and single:
        return _from_lengths_and_angles(flat, length)
    raise StructureError(
        "bad_cell",
        f"the cell has shape {found.shape}, not (3, 3), three lengths, or three lengths and three angles in degrees",
    )


def _from_lengths_and_angles(six: NDArray[np.float64], length: float) -> NDArray[np.float64]:
    lengths, angles = six[:3], six[3:]
    possible = np.isfinite(six).all() and (lengths > 0).all() and (angles >= SMALLEST_ANGLE).all()
    if possible and (angles <= 180 - SMALLEST_ANGLE).all():
        cosines = np.cos(np.radians(angles))
        if 1 - (cosines**2).sum() + 2 * cosines.prod() > 1e-6:  # otherwise no three vectors have these angles
            return np.asarray(cellpar_to_cell([*(length * lengths), *angles]), dtype=np.float64)
    raise StructureError(
        "bad_cell", f"the six numbers of the cell, {six.tolist()}, are not three lengths and three angles in degrees"
    )


def periodicity(value: Any, cell: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether a structure is periodic along each cell vector, [3].

    `value` is one flag or three of them: booleans, 0 and 1, or texts such as 'T T F', 'TTF' or 'false'. None stands
    for the directions of the cell vectors that are not zero. Raises StructureError for anything else.
    """
    if value is None:
        return np.asarray(cell.any(axis=1))
    flags = [_flag(item, value) for item in _items(value)]
    if len(flags) not in (1, 3):
        raise _no_flags(value)
    return np.array(flags * 3 if len(flags) == 1 else flags, dtype=bool)


def is_true(value: Any, name: str) -> bool:
    """Return a single flag; raise StructureError for anything but true and false, 1 and 0, or texts of them."""
    try:
        return _flag(value, value)
    except StructureError as error:
        raise StructureError("unreadable", f"'{name}' is {_short(value)}, neither true nor false") from error


def _items(value: Any) -> list[Any]:
    """Return the single flags in a value: the elements of an array, or the words or letters of a text."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        try:
            found = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise _no_flags(value) from error
        if sum(size != 1 for size in found.shape) > 1:
            raise _no_flags(value)
        items = found.reshape(-1).tolist()
        return _items(items[0]) if len(items) == 1 and isinstance(items[0], str | bytes) else items
    words = value.strip(" \t\r\n[](){}\"'").replace(",", " ").split()
    if len(words) == 1 and words[0].lower() not in FLAGS and len(words[0]) == 3:
        return list(words[0])
    return list(words)


def _flag(item: Any, value: Any) -> bool:
    if isinstance(item, bytes):
        item = item.decode("utf-8", "replace")
    if isinstance(item, str):
        flag = FLAGS.get(item.strip("\"'").lower())
    else:
        flag = bool(item) if isinstance(item, bool | int | float) and item in (0, 1) else None
    if flag is None:
        raise _no_flags(value)
    return flag


def _no_flags(value: Any) -> StructureError:
    return StructureError("bad_pbc", f"the pbc is {_short(value)}, not one or three flags (true or false, 1 or 0)")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
