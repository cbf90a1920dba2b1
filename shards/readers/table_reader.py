"""Parquet tables with a row for each structure, read in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.column_names import LABELS, column_names
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings, UnreadFrame, brief, reader

ROWS = 256


@reader(suffixes=(".parquet",))
def read_parquet(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the rows of a parquet file by [columns]: numbers (list), positions and forces (nested or flat lists), ...

    Other columns of texts and numbers become fields of the frame. Raises SourceError if a column is missing or the
    file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    maker, names = FrameMaker(settings), column_names(settings)
    try:
        with pq.ParquetFile(path) as file:
            there = set(file.schema_arrow.names)
            missing = [names[part] for part in ("numbers", "positions", *settings.columns) if names[part] not in there]
            if missing:
                raise SourceError(
                    f"{path} has no column '{missing[0]}' but {', '.join(sorted(there))}; name its columns under "
                    "[columns]."
                )
            total, number = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    source_id = f"{path.name}#{number}"
                    number += 1
                    yield UnreadFrame(
                        source_id=source_id,
                        read=partial(frame_from_row, row, names, source_id, maker),
                        fraction=number / total,
                    )
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is not a complete parquet file ({brief(error)}); copy it again.") from error


def frame_from_row(row: dict[str, Any], names: dict[str, str], source_id: str, maker: FrameMaker) -> Frame:
    """Return the frame of a row; flat lists of three numbers per atom are reshaped."""
    parts = {part: row[key] for part, key in names.items() if row.get(key) is not None}
    for part in ("positions", "forces"):
        values = np.asarray(parts.get(part, ()), dtype=np.float64) if part in parts else None
        if values is not None and values.ndim == 1 and values.size % 3 == 0:
            parts[part] = values.reshape(-1, 3)
    cell = np.reshape(parts.get("cell", np.zeros((3, 3))), (3, 3))
    raw = RawFrame(
        numbers=parts.get("numbers", []),
        positions=parts.get("positions", []),
        cell=cell,
        pbc=parts.get("pbc", cell.any(axis=1)),
        **{label: parts[label] for label in LABELS if label in parts},
        other=row,
    )
    info = {key: value for key, value in row.items() if isinstance(value, str | bytes | int | float)}
    return maker.make(raw, source_id, info)
