"""Structures from ASE atoms: elements, charge and spin multiplicity are taken over as they are or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ase import Atoms

from hydrazero.shards.conditions import condition_named, is_set
from hydrazero.shards.errors import StructureError
from hydrazero.shards.readers.ase_atoms import check_occupancy
from hydrazero.shards.structure import Structure, atomic_numbers_of, charge_of, check_structure, multiplicity_of
from hydrazero.shards.text.foreign_text import escaped

CONDITIONS = ("charge", "multiplicity")
"""Keys of `atoms.info` on which predictions may depend."""
TINY = 1e-3
"""Largest sum of initial charges that is taken for zero."""


def structure_from_atoms(atoms: Atoms, source_id: str = "") -> Structure:
    """Return the structure of ASE atoms, with charge and multiplicity from `atoms.info` and without labels.

    Raises StructureError if it is not valid, or comes from a file with shared or partly empty sites.
    """
    check_occupancy(atoms)
    charge, multiplicity = conditions_of(atoms)
    structure = Structure(
        numbers=atomic_numbers_of(atoms.numbers),
        positions=np.array(atoms.positions, dtype=np.float64),
        cell=np.array(atoms.cell[:], dtype=np.float64),
        pbc=np.array(atoms.pbc, dtype=bool),
        charge=charge,
        multiplicity=multiplicity,
        source_id=source_id,
    )
    check_structure(structure)
    return structure


def conditions_of(atoms: Atoms) -> tuple[int, int]:
    """Return charge and multiplicity in `atoms.info`, 0 where a key is missing; raise StructureError if not valid."""
    charge, multiplicity = (atoms.info.get(key) for key in CONDITIONS)
    return charge_of(charge, "atoms.info['charge']"), multiplicity_of(multiplicity, "atoms.info['multiplicity']")


def check_names(
    info: Mapping[str, Any], charge: str | None = "charge", multiplicity: str | None = "multiplicity"
) -> None:
    """Raise StructureError if charge or spin stand under a name that is not read, and are not zero.

    Otherwise a charged structure would be computed as a neutral one. `charge` and `multiplicity` are the names that
    are read, None for what is known already.
    """
    for kind, name in _named_otherwise(info, charge, multiplicity):
        read = charge if kind == "charge" else multiplicity
        raise StructureError(
            f"{kind}_name",
            f"its '{name}' is {info[name]}, but the {kind} is read from '{read}', which is not there; rename it",
        )


def unread_condition(
    info: Mapping[str, Any], charge: str | None = "charge", multiplicity: str | None = "multiplicity"
) -> str | None:
    """Return a charge or spin under a name that is not read, as "'total_charge' 1", for tasks that ignore both.

    None if there is none, or only a spin multiplicity of 1 or 2; the names are those of `check_names`.
    """
    for _, name in _named_otherwise(info, charge, multiplicity):
        value = info[name]
        if not ("mult" in name.lower() and str(value).strip() in ("1", "2", "1.0", "2.0")):
            return f"'{escaped(name)}' {escaped(value)[:40]}"
    return None


def _named_otherwise(
    info: Mapping[str, Any], charge: str | None, multiplicity: str | None
) -> Iterator[tuple[str, str]]:
    """Yield kind and name of each charge or spin that is not zero and stands under a name that is not read."""
    for read, kind in ((charge, "charge"), (multiplicity, "multiplicity")):
        if read is None or info.get(read) is not None:
            continue
        for name, value in info.items():
            if condition_named(name) == kind and name != read and is_set(value):
                yield kind, name


def all_conditions(atoms: Atoms) -> Mapping[str, Any]:
    """Return `atoms.info`, and the sum of the initial charges of the atoms if it is not zero."""
    charges = atoms.arrays.get("initial_charges")
    if charges is None:
        return dict(atoms.info)
    total = float(np.sum(np.asarray(charges, dtype=np.float64)))
    return {**atoms.info, "initial_charges": total if abs(total) > TINY else 0.0}


def check_all_conditions(atoms: Atoms) -> None:
    """Raise StructureError if charge or spin of ASE atoms are given in another place than `atoms.info`."""
    check_names(all_conditions(atoms))


def stated_conditions(atoms: Atoms) -> str:
    """Return all that `atoms.info` says about charge and spin, under any name, as a text that can be compared."""
    found = ((name, value) for name, value in atoms.info.items() if condition_named(name))
    return repr(sorted(found, key=lambda pair: pair[0]))
