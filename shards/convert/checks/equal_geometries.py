"""Structures of equal geometry with different energies, and the fields of their frames that may explain this."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydrazero.shards.convert.folder import Conversion
from hydrazero.shards.convert.frames import ChunkFile, chunk_path
from hydrazero.shards.readers import unread

TOLERANCE = 1e-3
"""Difference in eV/atom up to which energies of one geometry count as equal."""
LOOKED_AT = 5
"""Number of sets of equal geometries whose frames are read again."""
FRAMES_OF_SET = 8
"""Number of frames that are read again of each set."""
SHOWN_FIELDS, SHOWN_VALUES, LONGEST_VALUE = 2, 5, 40
TELLING = ("functional", "xc", "method", "theory", "level", "fidelity", "basis", "config_type", "code", "calc", "spin")
"""Parts of the names of fields that are shown first."""

SETS = """
SELECT hash, COUNT(energy), MIN(energy), MAX(energy), atoms FROM frames WHERE hash IN
(SELECT hash FROM frames GROUP BY hash HAVING COUNT(*) > 1)
GROUP BY hash HAVING MAX(energy) - MIN(energy) > ? * atoms ORDER BY MIN(number)
"""
MEMBERS = "SELECT source, chunk, row FROM frames WHERE hash = ? AND energy IS NOT NULL ORDER BY number LIMIT ?"
EXTREMES = (
    "SELECT source, chunk, row FROM frames WHERE hash = ? AND energy IS NOT NULL ORDER BY energy, number LIMIT 1",
    "SELECT source, chunk, row FROM frames WHERE hash = ? AND energy IS NOT NULL ORDER BY energy DESC, number LIMIT 1",
)
"""Statements for the members of a set with the lowest and the highest energy."""


def equal_geometry_warning(database: sqlite3.Connection, job: Conversion) -> str | None:
    """Return a sentence about equal geometries with different energies; None if there are none."""
    sets = database.execute(SETS, (TOLERANCE,)).fetchall()
    if not sets:
        return None
    worst = max(sets, key=lambda one: (one[3] - one[2]) / one[4])
    looked_at = [worst, *(one for one in sets if one is not worst)][:LOOKED_AT]
    members = [database.execute(MEMBERS, (one[0], FRAMES_OF_SET)).fetchall() for one in looked_at]
    names = [[frame_name(job, *member) for member in group] for group in members]
    low, high = (frame_name(job, *database.execute(query, (worst[0],)).fetchone()) for query in EXTREMES)
    kept = "; duplicates = 'drop' kept the first of each" if job.settings.duplicates == "drop" else ""
    return (
        f"{sum(one[1] for one in sets):,} structures in {len(sets):,} sets of equal geometry have different energies, "
        f"by up to {(worst[3] - worst[2]) / worst[4]:.3g} eV/atom ({low} and {high}): "
        f"{_reason(job, members, names)}{kept}."
    )


def frame_name(job: Conversion, source: int, chunk: int, row: int) -> str:
    """Return the source id of a structure in a chunk."""
    file = ChunkFile(chunk_path(job, source, chunk))
    ((_, columns),) = file.structures(np.array([row]))
    return columns["source_ids"].tobytes().decode()


def _reason(job: Conversion, members: Sequence[Sequence[Any]], names: Sequence[Sequence[str]]) -> str:
    """Return the likely reason: fields that differ, or files."""
    infos = _read_again(
        job, {(m[0], n) for group, own in zip(members, names, strict=True) for m, n in zip(group, own, strict=True)}
    )
    fields = _fields_that_differ([[infos.get(name, {}) for name in own] for own in names])
    separate = "convert labels of different methods as tasks of their own"
    if fields:
        shown = " and ".join(f"'{name}' ({', '.join(values)})" for name, values in fields)
        return f"they differ in {shown}; {separate}, with [select]"
    if all(len({member[0] for member in group}) == len(group) for group in members):
        return f"they come from different files; if these hold labels of different methods, {separate}"
    return (
        "no field of their frames says why, so some of these calculations are of another method, state or convergence; "
        f"{separate}, and leave out what is wrong"
    )


def _read_again(job: Conversion, wanted: set[tuple[int, str]]) -> dict[str, Mapping[str, Any]]:
    """Return source id -> fields of the frame."""
    settings = job.settings.read_settings(trust_pickle=job.trust_pickle)
    found: dict[str, Mapping[str, Any]] = {}
    for source in sorted({source for source, _ in wanted}):
        missing = {name for number, name in wanted if number == source}
        for frame in unread(job.sources[source], settings):
            name = job.names[source] + frame.source_id.removeprefix(job.sources[source].name)
            if name in missing:
                found[name] = frame.read().info
                missing.discard(name)
            if not missing:
                break
    return found


def _fields_that_differ(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str, list[str]]]:
    """Return the names and values of the fields that differ within every set and have few values altogether."""
    frames = sum(map(len, groups))
    found = []
    for key in dict.fromkeys(key for group in groups for info in group for key in info):
        values = [[_word(info.get(key)) for info in group] for group in groups]
        flat = [value for own in values for value in own]
        if None in flat or any(len(set(own)) < 2 for own in values):
            continue
        distinct = list(dict.fromkeys(str(value) for value in flat))
        if len(groups) == 1 or len(distinct) <= 0.6 * frames:
            found.append((key, distinct))
    found.sort(key=lambda one: not any(word in one[0].lower() for word in TELLING))
    telling = [one for one in found if any(word in one[0].lower() for word in TELLING)]
    return [
        (name, [*sorted(values)[:SHOWN_VALUES], *["..."] * (len(values) > SHOWN_VALUES)])
        for name, values in (telling or found)[:SHOWN_FIELDS]
    ]


def _word(value: Any) -> str | None:
    """Return a short text or whole number as text; None for anything else, such as labels."""
    if isinstance(value, (str, bool, int, np.bool_, np.integer)):
        text = str(value)
        return text if len(text) <= LONGEST_VALUE else None
    return None
