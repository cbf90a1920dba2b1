"""Frozen dataclasses from TOML tables: unknown keys and wrong types are refused, with the place and a suggestion."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hydrazero.shards.errors import ConfigError, did_you_mean

T = TypeVar("T")


def parse_settings(cls: type[T], table: Any, where: str) -> T:
    """Build a dataclass from a table; raises ConfigError that names `where` and the key at fault."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table, not {_shown(table)}.")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(f"{_path(where, key)} is not known{did_you_mean(str(key), known)}.")
    values = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in table:
            values[field.name] = _convert(hints[field.name], table[field.name], _path(where, field.name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{_path(where, field.name)} is missing.")
    return cls(**values)


def _path(where: str, key: object) -> str:
    separator = " " if where.endswith(":") else "."
    return f"{where}{separator}{key}"


def _convert(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (arg for arg in get_args(kind) if arg is not type(None))
        return _convert(kind, value, where)
    if is_dataclass(kind) and isinstance(kind, type):
        return parse_settings(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, not {_shown(value)}.")
        return tuple(_convert(get_args(kind)[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, not {_shown(value)}.")
        return {key: _convert(get_args(kind)[1], item, _path(where, key)) for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {_KINDS.get(kind, kind.__name__)}, not {_shown(value)}.")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _shown(value: Any) -> str:
    return f"{value!r}"
