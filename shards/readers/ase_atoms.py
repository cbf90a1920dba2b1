"""Frames from ASE atoms, which several formats are read into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from hydrazero.shards.errors import StructureError
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame

OCCUPANCY_ARRAYS = ("occupancy", "occupancies")
"""Arrays in which ASE keeps the occupancies of PDB and muSTEM files."""
FULL = 1e-3
"""Largest distance from 1 of the occupancy of a full site; files round."""


def frame_from_atoms(atoms: Atoms, source_id: str, maker: FrameMaker) -> Frame:
    """Return the frame of ASE atoms; labels come from stored results of the calculator, `info` or `arrays`.

    Six numbers of a stress among the results are in ASE's order, whatever the settings say; others are the source's.
    """
    # Stored results are used directly, since get_forces() would set the forces on fixed atoms to zero.
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    names = maker.settings.fields
    try:
        check_occupancy(atoms)
    except StructureError as error:
        return Frame(source_id=source_id, error=error, info=atoms.info)

    def label(name: str) -> Any:
        if not name:
            return None
        for place in (results, atoms.info, atoms.arrays):
            if name in place:
                return place[name]
        return None

    def tensor(name: str) -> Any:
        value = label(name)
        in_order_of_ase = name in results and np.shape(value) == (6,)
        return voigt_6_to_full_3x3_stress(value) if in_order_of_ase else value

    raw = RawFrame(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell[:],
        pbc=atoms.pbc,
        energy=label(names.energy),
        forces=label(names.forces),
        stress=tensor(names.stress),
        virial=tensor(names.virial),
        charge=label(names.charge),
        multiplicity=label(names.multiplicity),
        other={**atoms.arrays, **results},
        constraints=tuple(atoms.constraints),
    )
    info = atoms.info
    if "initial_charges" in atoms.arrays and raw.charge is None:
        # So that a screen can see that the structure is charged.
        info = {**info, "initial_charges": round(float(np.sum(atoms.arrays["initial_charges"])), 2)}
    return maker.make(raw, source_id, info)


def check_occupancy(atoms: Atoms) -> None:
    """Raise StructureError if the file that the atoms were read from has shared or partly empty sites.

    ASE puts one element on each such site, and keeps the occupancies in `info` (CIF) or in an array (PDB, muSTEM).
    """
    sites = atoms.info.get("occupancy")
    shared = isinstance(sites, Mapping) and any(map(_is_shared, sites.values()))
    arrays = (atoms.arrays[name] for name in OCCUPANCY_ARRAYS if name in atoms.arrays)
    # Programs that do not know occupancies write zeros.
    if shared or any(((values > FULL) & (values < 1 - FULL)).any() for values in arrays if values.dtype.kind == "f"):
        raise StructureError(
            "disordered",
            "a site is shared by several elements or partly empty; make an ordered structure of it, with one element "
            "on every site (and without the 'occupancy' in atoms.info)",
        )


def _is_shared(species: Any) -> bool:
    """Return whether a site, given as a mapping from elements to occupancies, does not have exactly one element."""
    if not isinstance(species, Mapping):
        return False
    try:
        occupancies = [float(value) for value in species.values()]
    except (TypeError, ValueError):
        return False
    return len(occupancies) != 1 or not abs(occupancies[0] - 1) <= FULL
