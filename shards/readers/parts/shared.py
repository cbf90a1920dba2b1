"""Arrays that hold a row for each frame, beside arrays that hold one value for all frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hydrazero.shards.errors import StructureError
from hydrazero.shards.targets import TargetSection

Shape = tuple[int, ...]

OWN = ("positions", "energy", "forces", "stress", "virial")
"""Parts that differ between frames, so that one value cannot hold for all of them."""


def part_shapes(part: str, atoms: int, target: TargetSection | None = None) -> tuple[Shape, ...]:
    """Return the shapes that a part may have in one frame, the usual one first; none for a field of any shape."""
    by_atom = ((atoms, 3), (3 * atoms,))
    matrix = ((3, 3), (9,), (6,))
    shapes: dict[str, tuple[Shape, ...]] = {
        "numbers": ((atoms,),),
        "symbols": ((atoms,), ()),
        "positions": by_atom,
        "forces": by_atom,
        "cell": (*matrix, (3,), (0,)),
        "pbc": ((3,), (), (1,)),
        "stress": matrix,
        "virial": matrix,
        **dict.fromkeys(("energy", "charge", "multiplicity"), ((), (1,))),
    }
    if target is None:
        return shapes.get(part, ())
    if target.of == "atom":
        return by_atom if target.kind == "vector" else ((atoms,), (atoms, 1))
    return ((3,), (1, 3)) if target.kind == "vector" else ((), (1,))


def shared_parts(
    columns: Mapping[str, Any],
    names: Mapping[str, str],
    frames: int,
    atoms: int,
    targets: Mapping[str, TargetSection],
) -> frozenset[str]:
    """Return the parts of which one value holds for all frames; `targets` are those of the settings by field.

    An array is shared if its shape is that of one frame, and has rows if every row has such a shape. Where both are
    possible, as for a pbc of three flags beside three frames, the number of axes decides: it is shared. Raises
    StructureError for an array that is neither, for a label that is not given for each frame, and for nine numbers that
    can be one cell or the lengths of three.
    """
    for part, column in columns.items():
        if part == "cell" and frames == 3:
            check_one_cell(column, names[part])
    return frozenset(
        part
        for part, column in columns.items()
        if _is_shared(part, names[part], np.shape(column), _kind(column), frames, atoms, targets.get(part))
    )


def check_one_cell(column: Any, name: str) -> None:
    """Raise StructureError for an array [3, 3] that can be one cell or the lengths of three right-angled ones."""
    if np.shape(column) == (3, 3) and np.asarray(column).dtype.kind in "iuf" and (np.asarray(column) > 0).all():
        raise StructureError(
            "ambiguous_shape",
            f"'{name}' has shape (3, 3), which can be one cell, or three lengths for each of 3 frames",
        )


def _kind(column: Any) -> str:
    return "symbols" if getattr(column, "dtype", np.dtype(float)).kind in "SUO" else "numbers"


def _is_shared(
    part: str, name: str, shape: Shape, kind: str, frames: int, atoms: int, target: TargetSection | None
) -> bool:
    allowed = part_shapes(kind if part == "numbers" else part, atoms, target)
    by_frame, single = shape[:1] == (frames,) and (not allowed or shape[1:] in allowed), shape in allowed
    if not allowed:  # a field of the frame, whose shape is not known
        return not by_frame
    if single and (part not in OWN or frames == 1):
        return True
    if by_frame:
        return False
    if frames == 1 or (shape[:1] == (1,) and shape[1:] in allowed and part not in OWN):
        return True  # what is wrong with it is found where the frame is made
    usual = " or ".join(str((frames, *one)) for one in allowed[:2])
    raise StructureError(
        "ambiguous_shape", f"'{name}' has shape {shape}, where {frames} frames of {atoms} atoms need {usual}"
    )
