"""Tables of the keys of a settings class, for the reference pages: type, default and meaning of each.

Everything is read from the classes themselves: types from annotations, meanings from the docstring under each field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin

REQUIRED = "required"
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "table", Any: "any value"}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a table of a settings file."""

    name: str
    kind: Any
    """Annotation without its constraints."""
    limits: str
    """Constraints in words, such as 'at least 1'; empty if there are none."""
    default: str
    """TOML text, 'required', or 'not set'."""
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a settings file, such as [train] or [[tasks]]."""

    heading: str
    """As it stands in the file; empty for keys before the first table."""
    path: str
    """Prefix of its keys, such as 'train'; empty for keys before the first table."""
    about: str
    """First paragraphs of the class's docstring."""
    keys: tuple[Key, ...]


def keys_of(cls: type, instance: Any = None) -> list[Key]:
    """Return the keys of a pydantic model or of a dataclass with a docstring under each field.

    Defaults are the values of `instance`, where the whole table has a default, else those of the class.
    """
    keys = _keys_of_model(cls) if hasattr(cls, "model_fields") else _keys_of_dataclass(cls)
    if instance is None:
        return keys
    return [dataclasses.replace(key, default=_toml(getattr(instance, key.name))) for key in keys]


def _keys_of_dataclass(cls: Any) -> list[Key]:
    hints = typing.get_type_hints(cls, include_extras=True)
    meanings = _docstrings(cls)
    keys = []
    for field in dataclasses.fields(cls):
        kind, limits = _without_limits(hints[field.name])
        default = REQUIRED
        if field.default is not dataclasses.MISSING:
            default = _toml(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = _toml(field.default_factory())
        meaning = meanings.get(field.name, "")
        keys.append(Key(name=field.name, kind=kind, limits=limits, default=default, meaning=meaning))
    return keys


def _keys_of_model(cls: Any) -> list[Key]:
    return [_key_of_model(name, info) for name, info in cls.model_fields.items()]


def _key_of_model(name: str, info: Any) -> Key:
    default = REQUIRED if info.is_required() else _toml(info.get_default(call_default_factory=True))
    kind, limits = _without_limits(info.annotation)
    words = [*filter(None, [limits]), *_limit_words(info.metadata)]
    return Key(
        name=info.alias or name,
        kind=kind,
        limits=", ".join(words),
        default=default,
        meaning=inspect.cleandoc(info.description or ""),
    )


def _without_limits(kind: Any) -> tuple[Any, str]:
    """Return an annotation without `Annotated`, and what that says in words."""
    if get_origin(kind) is not typing.Annotated:
        return kind, ""
    inner, *metadata = get_args(kind)
    return inner, ", ".join(_limit_words(metadata))


def _limit_words(metadata: Any) -> list[str]:
    words = []
    for item in metadata:
        for name, word in BOUNDS.items():
            value = getattr(item, name, None)
            if value is not None:
                words.append(f"{word} {value:g}")
        words += _limit_words(getattr(item, "metadata", ()))
    return words


def _docstrings(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = inspect.cleandoc(text.value.value)
    return found


def _toml(value: Any) -> str:
    """Return a default as it would stand in a file."""
    if value is None:
        return "not set"
    if dataclasses.is_dataclass(value) or hasattr(value, "model_fields"):
        return "see below"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def is_section(kind: Any) -> bool:
    """Whether a type is a settings class of its own."""
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "model_fields"))


def parts(kind: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, None left out; the type itself where it is none."""
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(part for part in get_args(kind) if part is not type(None))
    return (kind,)


def type_words(kind: Any, inline: Mapping[type, str]) -> str:
    """Return a type in a user's words."""
    kind, limits = _without_limits(kind)
    if limits:
        return f"{type_words(kind, inline)}, {limits}"
    alternatives = parts(kind)
    if len(alternatives) == 1 and alternatives[0] is not kind:  # the rest of a union with None
        return type_words(alternatives[0], inline)
    if len(alternatives) > 1:
        return " or ".join(type_words(part, inline) for part in alternatives)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (tuple, list):
        return f"list of {_plural(type_words(arguments[0], inline))}"
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return f"table: name = {type_words(arguments[1], inline)}"
    if kind in inline:
        return inline[kind]
    if is_section(kind):
        return "table"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _plural(words: str) -> str:
    return words + "s" if words in ("text", "whole number", "number", "table") else words


def tables_of(
    cls: type, inline: Mapping[type, str], heading: str = "", path: str = "", instance: Any = None
) -> Iterator[Table]:
    """Walk through the tables of a settings file: the class's own keys, then each of its sections.

    `inline` names classes that stand in a cell and not as a table of their own, with the words for them; `instance`
    is the default of the whole table.
    """
    keys = keys_of(cls, instance)
    sections = [(key, *_section_of(key.kind, inline)) for key in keys]
    plain = tuple(key for key, section, _ in sections if section is None)
    if plain:
        yield Table(heading=heading, path=path, about=_about(cls), keys=plain)
    for key, section, form in sections:
        if section is not None:
            name = f"{path}.{key.name}" if path else key.name
            suffix = ".NAME" if form == "dict" else ""
            brackets = "[[{}]]" if form == "list" else "[{}]"
            default = default_of(cls, key.name) if form == "one" else None
            yield from tables_of(section, inline, brackets.format(name + suffix), name + suffix, default)


def default_of(cls: Any, name: str) -> Any:
    """Return the default of a field; None if it has none."""
    if hasattr(cls, "model_fields"):
        info = cls.model_fields[name]
        return None if info.is_required() else info.get_default(call_default_factory=True)
    (field,) = [field for field in dataclasses.fields(cls) if field.name == name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _section_of(kind: Any, inline: Mapping[type, str]) -> tuple[type | None, str]:
    """Return the settings class behind a key, and whether the key holds one, a list or a dict of them."""
    for part in (_without_limits(part)[0] for part in parts(kind)):
        if is_section(part) and part not in inline:
            return part, "one"
        origin, arguments = get_origin(part), get_args(part)
        if origin in (tuple, list) and is_section(arguments[0]) and arguments[0] not in inline:
            return arguments[0], "list"
        if origin in (dict, Mapping) and is_section(arguments[1]) and arguments[1] not in inline:
            return arguments[1], "dict"
    return None, ""


def _about(cls: type) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    return "" if text.startswith(f"{cls.__name__}(") else text  # what dataclasses write themselves


def prose(text: str) -> str:
    """Return a text with what is no Markdown in it escaped; what stands in backticks stays."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*_<|\[\]])", r"\\\1", piece) for piece in pieces)


def cell(text: str) -> str:
    """Return a text as the cell of a Markdown table."""
    return prose(" ".join(text.split()))


def anchor_of(path: str) -> str:
    """Return the anchor of a key or table on its page: `train-max_hours` of train.max_hours."""
    return re.sub(r"[^a-z0-9_]+", "-", path.lower()).strip("-")


def markdown_of(cls: type, inline: Mapping[type, str] = MappingProxyType({}), skip: Collection[str] = ()) -> str:
    """Return the tables of a settings file in Markdown, each key with an anchor of its path.

    `skip` names tables or keys before the first table that stand elsewhere.
    """
    lines: list[str] = []
    for table in tables_of(cls, inline):
        if not table.path:
            table = dataclasses.replace(table, keys=tuple(key for key in table.keys if key.name not in skip))
        if table.path in skip or not table.keys:
            continue
        if table.heading:
            lines += [f"## `{table.heading}` {{ #{anchor_of(table.path)} }}", ""]
            lines += [prose(table.about), ""] if table.about else []
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in table.keys:
            path = f"{table.path}.{key.name}" if table.path else key.name
            kind = type_words(key.kind, inline) + (f", {key.limits}" if key.limits else "")
            default = key.default if key.default in (REQUIRED, "not set", "see below") else f"`{key.default}`"
            lines.append(f"| `{key.name}`{{ #{anchor_of(path)} }} | {kind} | {default} | {cell(key.meaning)} |")
        lines.append("")
    return "\n".join(lines)
