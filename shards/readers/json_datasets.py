"""JSON files of two large collections of crystals, MPtrj and Alexandria, read as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.frames import FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.json_structures import entry_frame, pymatgen_geometry
from hydrazero.shards.readers.opening import READ_ERRORS, open_binary, optional_module
from hydrazero.shards.readers.parts.json_stream import LINE_SUFFIXES, JsonText, is_json_lines, json_lines
from hydrazero.shards.text.foreign_text import escaped

Entries = Iterator[tuple[str, Any]]
"""Pairs (name in the file, entry with a 'structure')."""

Values = Iterator[tuple[str | None, int, Any]]
"""Triples (key of the outermost object, 0, its value), ('entries', number, entry), or (None, number, entry)."""

ENTRIES = "entries"
"""Key of a list of entries."""


@reader(further_suffixes=(".json", *LINE_SUFFIXES))
def read_mptrj(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of MPtrj (Deng et al. 2023): material id -> frame id -> entry with a pymatgen structure.

    The material id becomes the field 'material_id'. Raises SourceError if the file has another layout or is truncated.
    """
    return _read(path, settings, _by_material, _pairs)


@reader(further_suffixes=(".json", *LINE_SUFFIXES))
def read_alexandria(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of Alexandria (Schmidt et al. 2023): ComputedStructureEntry, or relaxation paths by material.

    The `data` of an entry count as its own values, and its forces are those of the sites of the structure. A path is a
    list of calculations with 'steps', and its frames have the field 'material_id'. Raises SourceError as `read_mptrj`
    does.
    """
    return _read(path, settings, _alexandria, _values)


def _read(
    path: Path,
    settings: ReadSettings,
    entries: Callable[[Values, Path], Entries],
    values_of: Callable[[Any, Any], Values],
) -> Iterator[UnreadFrame]:
    ijson = optional_module("ijson", "ijson", f"{path}: reading JSON as a stream")
    maker = FrameMaker(settings)
    name = "its start"
    with open_binary(path) as (file, fraction):
        if is_json_lines(path):
            values = _values_of_lines(json_lines(file, path))
        else:
            values = values_of(ijson, JsonText(file, path))
        try:
            for name, entry in entries(values, path):
                source_id = f"{path.name}#{name}"
                read = partial(entry_frame, entry, "structure", pymatgen_geometry, source_id, maker)
                yield UnreadFrame(source_id=source_id, read=read, fraction=fraction())
        except (*READ_ERRORS, ijson.JSONError) as error:
            raise SourceError(
                f"{path}, after {name}, is not valid JSON or is truncated ({_cause(error)}); copy it again."
            ) from error


def _cause(error: Exception) -> str:
    """Return the first line of the text of an error, which the parser may give as bytes."""
    text = error.args[0] if error.args else ""
    return text.decode("ascii", "replace").splitlines()[0] if isinstance(text, bytes) and text else brief(error)


def _by_material(values: Values, path: Path) -> Entries:
    for material, number, frames in values:
        if material is None:
            yield str(number), frames
            continue
        if not isinstance(frames, Mapping):
            raise SourceError(
                f"{path}: '{escaped(material)[:60]}' is not an object of frames, so the file does not have the layout "
                "of MPtrj."
            )
        for frame, entry in frames.items():
            yield f"{material}/{frame}", _with_material(entry, material)


def _alexandria(values: Values, path: Path) -> Entries:
    for key, number, value in values:
        if key in (None, ENTRIES):
            yield str(number), _relaxed(value)
            continue
        for place, calculation in enumerate(value if isinstance(value, list) else [value]):
            steps = calculation.get("steps") if isinstance(calculation, Mapping) else None
            if not isinstance(steps, list):
                raise SourceError(
                    f"{path}: '{escaped(key)[:60]}' has no 'steps', so the file does not have the layout of Alexandria."
                )
            for step, entry in enumerate(steps):
                yield f"{key}/{place}/{step}", _with_material(entry, key)


def _relaxed(entry: Any) -> Any:
    """Return a ComputedStructureEntry with its `data` as own values, and 'forces' from the properties of the sites."""
    if not isinstance(entry, Mapping):
        return entry
    data, structure = entry.get("data"), entry.get("structure")
    sites = structure.get("sites") if isinstance(structure, Mapping) else None
    listed = sites if isinstance(sites, list) else ()
    properties = [site.get("properties") for site in listed if isinstance(site, Mapping)]
    forces = [each.get("forces") if isinstance(each, Mapping) else None for each in properties]
    # If only some sites have forces, the list stays incomplete, and the frame is bad.
    labels = {"forces": forces} if any(force is not None for force in forces) else {}
    return {**labels, **(data if isinstance(data, Mapping) else {}), **entry}


def _with_material(entry: Any, material: str | None) -> Any:
    return {**entry, "material_id": material} if isinstance(entry, Mapping) else entry


def _values_of_lines(lines: Iterator[Any]) -> Values:
    """Yield what JSON lines hold: an entry in each line, or an object by the ids of materials."""
    for number, value in enumerate(lines):
        if not isinstance(value, Mapping) or "structure" in value:
            yield None, number, value
        else:
            yield from ((str(key), 0, item) for key, item in value.items())


def _pairs(ijson: Any, file: Any) -> Values:
    """Yield (key, 0, value) of the outermost object."""
    for key, value in ijson.kvitems(file, "", use_float=True):
        yield key, 0, value


def _values(ijson: Any, file: Any) -> Values:
    """Yield (key, 0, value) of the outermost object, and ('entries', n, item) for each item of its list `entries`.

    Reading by keys alone would build the list of a million entries before the first one is available.
    """
    key, number, depth, builder = "", 0, 0, None
    for prefix, event, value in ijson.parse(file, use_float=True):
        if builder is None:
            if prefix == "" and event == "map_key":
                key = value
            if prefix == "" or (prefix == ENTRIES and event in ("start_array", "end_array")):
                continue
            builder, depth = ijson.ObjectBuilder(), 0
        builder.event(event, value)
        depth += {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}.get(event, 0)
        if depth == 0:
            yield key, number, builder.value
            number, builder = number + 1, None
