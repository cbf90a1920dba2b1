"""LMDB files: those of ASE, and those of pickles, which are loaded only if the user trusts them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ase.db
import numpy as np

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.ase_reader import frame_from_row
from hydrazero.shards.readers.column_names import LABELS, column_names
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import optional_module

NOT_FRAMES = (b"length",)
"""Keys whose values describe the file."""


@reader(suffixes=(".aselmdb",))
def read_aselmdb(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the rows of an ASE database in LMDB (ase-db-backends); key-value pairs and data become fields.

    Raises SourceError if the file is of another kind or truncated; a damaged row is a bad frame.
    """
    lmdb = optional_module("lmdb", "lmdb", f"{path}: reading an ASE LMDB")
    optional_module("ase_db_backends", "ase-db-backends", f"{path}: reading an ASE LMDB")
    maker = FrameMaker(settings)
    with _environment(lmdb, path):
        pass  # rejects files that would end the process once they are mapped
    try:
        database: Any = ase.db.connect(str(path), type="aselmdb", serial=True, readonly=True)
    except Exception as error:  # depends on the damage: lmdb.Error, zlib.error, json errors, KeyError
        raise SourceError(f"{path} cannot be read as an ASE LMDB ({brief(error)}).") from error

    def read(number: int, source_id: str) -> Frame:
        try:
            row = database.get(id=number)
        except Exception as error:  # zlib, json and ASE raise errors of many kinds for a damaged row
            return Frame(source_id=source_id, error=StructureError("unreadable", brief(error)))
        return frame_from_row(row, source_id, maker)

    with database:
        rows = len(database.ids)
        for place, number in enumerate(database.ids):
            source_id = f"{path.name}#{number}"
            yield UnreadFrame(source_id=source_id, read=partial(read, number, source_id), fraction=(place + 1) / rows)


@reader(suffixes=(".lmdb", ".mdb"))
def read_lmdb(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield pickled dicts (or objects with attributes) of arrays or tensors, by the names in [columns].

    Raises SourceError if the settings do not trust pickles, since loading one can run any code.
    """
    if not settings.trust_pickle:
        raise SourceError(
            f"{path} holds pickles, and loading a pickle can run any code that its author put in; "
            "use --trust-pickle if you trust its origin."
        )
    lmdb = optional_module("lmdb", "lmdb", f"{path}: reading LMDB")
    maker, names = FrameMaker(settings), column_names(settings)
    with _environment(lmdb, path) as environment:
        entries = max(environment.stat()["entries"], 1)
        try:
            with environment.begin() as transaction:
                for place, (key, value) in enumerate(transaction.cursor()):
                    if key in NOT_FRAMES:
                        continue
                    source_id = f"{path.name}#{key.decode('utf-8', 'replace')}"
                    read = partial(_frame_from_pickle, value, names, source_id, maker)
                    yield UnreadFrame(source_id=source_id, read=read, fraction=(place + 1) / entries)
        except lmdb.Error as error:
            raise SourceError(f"{path} cannot be read to its end ({brief(error)}); copy it again.") from error


@contextmanager
def _environment(lmdb: Any, path: Path) -> Iterator[Any]:
    """Yield an LMDB file that is open for reading; raise SourceError if it is of another kind or truncated."""
    try:
        environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
    except (lmdb.Error, OSError) as error:
        raise SourceError(f"{path} is not a readable LMDB file ({brief(error)}).") from error
    with environment:
        # Pages are mapped, not read: a missing page would end the process.
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = path.stat().st_size
        if size < needed:
            raise SourceError(f"{path} has {size:,} bytes instead of {needed:,}, so it is truncated; copy it again.")
        yield environment


def _frame_from_pickle(value: bytes, names: Mapping[str, str], source_id: str, maker: FrameMaker) -> Frame:
    try:
        loaded = pickle.loads(value)
        entry = loaded if isinstance(loaded, Mapping) else _attributes(loaded)
        fields = {str(name): _plain(item) for name, item in entry.items()}
    except Exception as error:  # a pickle can raise anything
        fault = f"the pickle cannot be loaded ({type(error).__name__}: {brief(error)})"
        return Frame(source_id=source_id, error=StructureError("unreadable", fault))
    missing = [names[part] for part in ("numbers", "positions") if names[part] not in fields]
    if missing:
        fault = f"the pickle has no '{missing[0]}' but {', '.join(fields) or 'nothing'}; name its parts under [columns]"
        return Frame(source_id=source_id, error=StructureError("unreadable", fault), info=fields)
    cell = np.asarray(fields.get(names["cell"], np.zeros((3, 3))), dtype=np.float64)
    if cell.size != 9:
        fault = f"'{names['cell']}' has shape {cell.shape}, not (3, 3)"
        return Frame(source_id=source_id, error=StructureError("bad_cell", fault), info=fields)
    cell = cell.reshape(3, 3)
    labels = {label: fields[names[label]] for label in LABELS if names.get(label) in fields}
    raw = RawFrame(
        numbers=fields[names["numbers"]],
        positions=fields[names["positions"]],
        cell=cell,
        pbc=fields.get(names["pbc"], cell.any(axis=1)),
        **labels,
    )
    return maker.make(raw, source_id, fields)


def _attributes(value: Any) -> Mapping[str, Any]:
    """Return the fields of an object such as PyTorch Geometric's Data."""
    return value.to_dict() if hasattr(value, "to_dict") else vars(value)


def _plain(value: Any) -> Any:
    """Return a tensor as an array, and any other value unchanged."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
