"""JSON lists of labelled structures, in the forms of pymatgen and JARVIS, read as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import READ_ERRORS, open_binary, optional_module
from hydrazero.shards.readers.parts.fixed_atoms import constraints_of
from hydrazero.shards.readers.parts.geometry import is_true
from hydrazero.shards.readers.parts.json_stream import LINE_SUFFIXES, list_entries
from hydrazero.shards.readers.symbols import numbers_of

Geometry = dict[str, Any]
"""Values of numbers, positions, cell, pbc and constraints of a RawFrame."""


@reader(further_suffixes=(".json", *LINE_SUFFIXES))
def read_pymatgen(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield a list of objects with a pymatgen dict as 'structure'; labels have dotted paths such as 'outputs.energy'.

    The objects may also stand in a line each (JSON lines). NaN is read as null, which stands for no label. Raises
    SourceError if the file is neither, or is truncated.
    """
    return _read_list(path, settings, "structure", pymatgen_geometry)


@reader(further_suffixes=(".json", *LINE_SUFFIXES))
def read_jarvis(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield a list of objects with a JARVIS dict as 'atoms'; raise SourceError as `read_pymatgen` does."""
    return _read_list(path, settings, "atoms", jarvis_geometry)


def _read_list(
    path: Path, settings: ReadSettings, key: str, geometry: Callable[[Mapping[str, Any]], Geometry]
) -> Iterator[UnreadFrame]:
    ijson = optional_module("ijson", "ijson", f"{path}: reading JSON as a stream")
    maker = FrameMaker(settings)
    number = -1
    with open_binary(path) as (file, fraction):
        try:
            for number, entry in enumerate(list_entries(ijson, file, path, key)):
                source_id = f"{path.name}#{number}"
                read = partial(entry_frame, entry, key, geometry, source_id, maker)
                yield UnreadFrame(source_id=source_id, read=read, fraction=fraction())
        except (*READ_ERRORS, ijson.JSONError) as error:
            raise SourceError(
                f"{path}, after frame {number}, is not a complete JSON file ({brief(error)}); copy it again."
            ) from error
    if number < 0:
        raise SourceError(f"{path} is not a JSON list of objects with '{key}', or is empty; check the format.")


def entry_frame(
    entry: Any, key: str, geometry: Callable[[Mapping[str, Any]], Geometry], source_id: str, maker: FrameMaker
) -> Frame:
    """Return the frame of an entry whose structure is at `key` and parsed by `geometry`; labels have dotted paths."""
    if isinstance(entry, StructureError):
        return Frame(source_id=source_id, error=entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get(key), Mapping):
        fault = StructureError("unreadable", f"the entry is not an object that contains an object '{key}'")
        return Frame(source_id=source_id, error=fault)
    info = dict(flattened({name: value for name, value in entry.items() if name != key}))
    try:
        parts = geometry(entry[key])
    except StructureError as error:
        return Frame(source_id=source_id, error=error, info=info)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        fault = StructureError("unreadable", f"'{key}' has an unknown layout ({type(error).__name__}: {brief(error)})")
        return Frame(source_id=source_id, error=fault, info=info)
    names = maker.settings.fields

    def own(label: str, key_of_structure: str) -> Any:
        """Return a label of the entry, or else that of the structure itself; none that the settings leave out."""
        name = getattr(names, label)
        return info.get(name, entry[key].get(key_of_structure)) if name else None

    raw = RawFrame(
        **parts,
        energy=info.get(names.energy),
        forces=info.get(names.forces),
        stress=info.get(names.stress),
        virial=info.get(names.virial),
        charge=own("charge", "charge"),
        multiplicity=own("multiplicity", "spin_multiplicity"),
    )
    return maker.make(raw, source_id, info)


def flattened(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) for all values in nested objects."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def pymatgen_geometry(structure: Mapping[str, Any]) -> Geometry:
    """Return the geometry in the dict of a pymatgen Structure or Molecule.

    Raises StructureError for a site with several elements, and KeyError, TypeError, ... for any other dict.
    """
    sites = structure["sites"]
    lattice = structure.get("lattice")
    cell = np.zeros((3, 3)) if lattice is None else np.asarray(lattice["matrix"], dtype=np.float64)
    if lattice is None:
        positions = np.array([site["xyz"] for site in sites], dtype=np.float64)
    else:
        # pymatgen itself uses the fractional coordinates.
        positions = np.array([site["abc"] for site in sites], dtype=np.float64) @ cell
    pbc = lattice is not None if lattice is None or "pbc" not in lattice else lattice["pbc"]
    flags = [(site.get("properties") or {}).get("selective_dynamics") or (True, True, True) for site in sites]
    return {
        "numbers": numbers_of(map(_only_element, sites)),
        "positions": positions,
        "cell": cell,
        "pbc": pbc,
        "constraints": tuple(constraints_of(np.array(flags, dtype=bool).reshape(-1, 3), scaled=True)),
    }


def _only_element(site: Mapping[str, Any]) -> str:
    species = site["species"]
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise StructureError("disordered", "a site is shared by several elements or partly empty")
    return str(species[0]["element"])


def jarvis_geometry(atoms: Mapping[str, Any]) -> Geometry:
    """Return the geometry in the dict of JARVIS Atoms; raise as `pymatgen_geometry` does."""
    cell = np.asarray(atoms["lattice_mat"], dtype=np.float64)
    coordinates = np.asarray(atoms["coords"], dtype=np.float64)
    positions = coordinates if is_true(atoms["cartesian"], "cartesian") else coordinates @ cell
    return {"numbers": numbers_of(atoms["elements"]), "positions": positions, "cell": cell, "pbc": True}
