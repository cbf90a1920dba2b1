"""Atoms that a source fixes, as ASE's constraints, from arrays with the names that usual programs give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ase.constraints import FixAtoms, FixCartesian, FixScaled
from numpy.typing import NDArray

MOVABLE = {"fixed": False, "move_mask": True, "selective_dynamics": True}
"""Name of an array of atoms, [atoms] or [atoms, 3] -> whether its true entries are free to move."""

TRUE = ("t", "true", "1")


def fixed_in(fields: Mapping[str, Any], atoms: int) -> tuple[Any, ...]:
    """Return the constraints in the fields of a frame; values of any other shape do not concern atoms."""
    found: list[Any] = []
    for name, free in MOVABLE.items():
        if atoms and name in fields and fields[name] is not None:
            try:
                values = np.asarray(fields[name])
                texts = values.dtype.kind in "SU"
                flags = np.isin(np.char.lower(values.astype(str)), TRUE) if texts else values.astype(bool)
            except (TypeError, ValueError):
                continue
            if flags.shape in ((atoms,), (atoms, 1), (atoms, 3)):
                # Only selective dynamics, which is VASP's word, is along the lattice vectors.
                movable = np.broadcast_to((flags == free).reshape(atoms, -1), (atoms, 3))
                found += constraints_of(movable, scaled=name == "selective_dynamics")
    return tuple(found)


def constraints_of(movable: NDArray[np.bool_], *, scaled: bool) -> list[Any]:
    """Return the constraints of atoms that may move along axes where `movable` [atoms, 3] is true.

    The axes are the lattice vectors if `scaled` is true, otherwise x, y and z.
    """
    found: list[Any] = []
    for mask in np.unique(~movable, axis=0):
        places = np.flatnonzero((~movable == mask).all(axis=1))
        if mask.all():
            found.append(FixAtoms(places))
        elif mask.any():
            found.append((FixScaled if scaled else FixCartesian)(places, mask=mask))
    return found
