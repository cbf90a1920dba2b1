"""Parquet tables with a row for each structure, read in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.column_names import listed
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.parts.frame_parts import frame_of_parts, names_in
from hydrazero.shards.readers.parts.stated_units import StatedUnit, units_by_key, with_stated_units

ROWS = 256


@reader(suffixes=(".parquet",))
def read_parquet(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the rows of a parquet file by [columns]: numbers (list), positions and forces (nested or flat lists), ...

    Numbers may be symbols. Other columns of texts and numbers become fields of the frame. Units in the metadata of the
    file are used. Raises SourceError if a column is missing, the file is damaged, or the settings contradict its units.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = set(file.schema_arrow.names)
            names = names_in(settings, there)
            missing = [names[part] for part in ("numbers", "positions", *settings.columns) if names[part] not in there]
            if missing:
                raise SourceError(
                    f"{path} has no column '{missing[0]}' but {listed(sorted(there))}; name its columns under "
                    "[columns]."
                )
            parts = [part for part, name in names.items() if name in there]
            maker = FrameMaker(with_stated_units(settings, _stated(file.schema_arrow, names), path, parts))
            total, number = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    source_id = f"{path.name}#{number}"
                    number += 1
                    yield UnreadFrame(
                        source_id=source_id,
                        read=partial(frame_from_columns, row, names, source_id, maker),
                        fraction=number / total,
                    )
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is not a complete parquet file ({brief(error)}); copy it again.") from error


def _stated(schema: Any, names: dict[str, str]) -> dict[str, StatedUnit]:
    """Return part -> unit in the metadata of the columns ('units') or of the table ('energy_unit')."""
    stated = units_by_key(_decoded(schema.metadata), "metadata")
    for part, name in names.items():
        if name in schema.names:
            for key, value in _decoded(schema.field(name).metadata).items():
                if key.lower() in ("unit", "units"):
                    stated[part] = StatedUnit(unit=value, where=f"metadata '{key}' of the column '{name}'")
    return stated


def _decoded(metadata: dict[bytes, bytes] | None) -> dict[str, str]:
    return {key.decode("utf-8", "replace"): text.decode("utf-8", "replace") for key, text in (metadata or {}).items()}


def frame_from_columns(row: dict[str, Any], names: dict[str, str], source_id: str, maker: FrameMaker) -> Frame:
    """Return the frame of a row."""
    parts = {part: row[key] for part, key in names.items() if row.get(key) is not None}
    info = {key: value for key, value in row.items() if isinstance(value, str | bytes | int | float)}
    return frame_of_parts(parts, source_id, maker, info=info, other=row)
