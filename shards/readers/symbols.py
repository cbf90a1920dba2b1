"""Atoms of a source: atomic numbers from chemical symbols, and atoms that are fixed, as ASE's constraints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ase.constraints import FixAtoms, FixCartesian, FixScaled
from ase.data import atomic_numbers
from numpy.typing import NDArray

from hydrazero.shards.errors import StructureError
from hydrazero.shards.text.foreign_text import escaped

MOVABLE = {"fixed": False, "move_mask": True, "selective_dynamics": True}
"""Name of an array of atoms, [atoms] or [atoms, 3] -> whether its true entries are free to move."""

TRUE = ("t", "true", "1")


def numbers_of(symbols: Iterable[Any]) -> NDArray[np.uint8]:
    """Return the atomic numbers [atoms] of chemical symbols; raise StructureError for an unknown symbol."""
    names = [symbol.decode("ascii", "replace") if isinstance(symbol, bytes) else str(symbol) for symbol in symbols]
    for name in names:
        if atomic_numbers.get(name, 0) < 1:
            raise StructureError("unknown_element", f"'{escaped(name[:40])}' is not a chemical element")
    return np.array([atomic_numbers[name] for name in names], dtype=np.uint8)


def fixed_in(fields: Mapping[str, Any], atoms: int) -> tuple[Any, ...]:
    """Return the constraints in the fields of a frame; values of any other shape do not concern atoms."""
    found: list[Any] = []
    for name, free in MOVABLE.items():
        if name in fields and fields[name] is not None:
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
