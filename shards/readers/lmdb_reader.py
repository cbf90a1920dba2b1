"""LMDB files: those of ASE, and those of pickles, which are loaded only if the user trusts them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ase.db

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.ase_reader import DATABASE_LABELS, frame_from_row
from hydrazero.shards.readers.column_names import listed
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.readers.parts.frame_parts import frame_of_parts, names_in
from hydrazero.shards.readers.parts.stated_units import schnetpack_units, with_stated_units

SERVICE_KEYS = frozenset(
    {
        *("length", "len", "size", "count", "num_samples", "num_examples", "num_entries", "keys", "_keys", "nextid"),
        *("metadata", "_metadata", "meta", "info", "version", "config", "stats", "statistics", "deleted_ids"),
    }
)
"""Keys, in small letters, whose values describe the file; so do those of keys such as '__len__'."""

FAIRCHEM_LABELS = {**DATABASE_LABELS, "spin": "multiplicity"}
"""Name in the databases of fairchem -> label; its spin is the multiplicity, and 0 stands for an unknown one."""


@reader(suffixes=(".aselmdb",))
def read_aselmdb(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the rows of an ASE database in LMDB (ase-db-backends); key-value pairs and data become fields.

    Charge and multiplicity are 'charge' and 'spin', as fairchem writes them, unless the settings name other fields.
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
        return frame_from_row(row, source_id, maker, FAIRCHEM_LABELS)

    with database:
        rows = len(database.ids)
        for place, number in enumerate(database.ids):
            source_id = f"{path.name}#{number}"
            yield UnreadFrame(source_id=source_id, read=partial(read, number, source_id), fraction=(place + 1) / rows)


@reader(suffixes=(".lmdb", ".mdb"))
def read_lmdb(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield pickled dicts (or objects with attributes) of arrays or tensors, by the names in [columns].

    Entries that describe the file, such as 'length' or '__len__', are no frames. Raises SourceError if the settings do
    not trust pickles, since loading one can run any code.
    """
    if not settings.trust_pickle:
        raise SourceError(
            f"{path} holds pickles, and loading a pickle can run any code that its author put in; "
            "use --trust-pickle if you trust its origin."
        )
    lmdb = optional_module("lmdb", "lmdb", f"{path}: reading LMDB")
    with _environment(lmdb, path) as environment:
        entries = max(environment.stat()["entries"], 1)
        try:
            with environment.begin() as transaction:
                maker = FrameMaker(_with_units_of(transaction.get(b"_metadata"), settings, path))
                for place, (key, value) in enumerate(transaction.cursor()):
                    if _is_service(key, value):
                        continue
                    source_id = f"{path.name}#{key.decode('utf-8', 'replace')}"
                    read = partial(_frame_from_pickle, value, source_id, maker)
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


def _is_service(key: bytes, value: bytes) -> bool:
    """Return whether an entry describes the file: by its key, or because a key of letters holds no mapping."""
    if key.decode("utf-8", "replace").lower() in SERVICE_KEYS or (key.startswith(b"__") and key.endswith(b"__")):
        return True
    if any(48 <= byte <= 57 for byte in key):  # a digit, so it is the key of a frame
        return False
    try:
        loaded = pickle.loads(value)
    except Exception:  # a damaged frame
        return False
    return isinstance(loaded, str | bytes | int | float | list | tuple | None)


def _with_units_of(metadata: bytes | None, settings: ReadSettings, path: Path) -> ReadSettings:
    """Return the settings with the units in the metadata that SchNetPack writes, if there are any."""
    try:
        loaded = {} if metadata is None else pickle.loads(metadata)
    except Exception:  # of something else
        return settings
    stated = schnetpack_units(loaded, settings) if isinstance(loaded, Mapping) else {}
    return with_stated_units(settings, stated, path)


def _frame_from_pickle(value: bytes, source_id: str, maker: FrameMaker) -> Frame:
    try:
        loaded = pickle.loads(value)
        entry = loaded if isinstance(loaded, Mapping) else _attributes(loaded)
        fields = {str(name): _plain(item) for name, item in entry.items()}
    except Exception as error:  # a pickle can raise anything
        fault = f"the pickle cannot be loaded ({type(error).__name__}: {brief(error)})"
        return Frame(source_id=source_id, error=StructureError("unreadable", fault))
    names = names_in(maker.settings, fields)
    missing = [names[part] for part in ("numbers", "positions") if names[part] not in fields]
    if missing:
        fault = f"the pickle has no '{missing[0]}' but {listed(fields) or 'nothing'}; name its parts under [columns]"
        return Frame(source_id=source_id, error=StructureError("unreadable", fault), info=fields)
    parts = {part: fields[name] for part, name in names.items() if name in fields}
    return frame_of_parts(parts, source_id, maker, info=fields, other=parts)


def _attributes(value: Any) -> Mapping[str, Any]:
    """Return the fields of an object such as PyTorch Geometric's Data."""
    if not hasattr(value, "to_dict") and not hasattr(value, "__dict__"):
        raise TypeError(f"it holds a {type(value).__name__}, not a dict or an object with attributes")
    return value.to_dict() if hasattr(value, "to_dict") else vars(value)


def _plain(value: Any) -> Any:
    """Return a tensor as an array, and any other value unchanged."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
