"""Settings files and JSON of other people: types of values, and one sentence for whatever is wrong in a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hydrazero.shards.errors import ConfigError, HydrazeroError, did_you_mean
from hydrazero.shards.text.foreign_text import escaped

T = TypeVar("T")
S = TypeVar("S", bound="Section")

ListOf = Annotated[tuple[T, ...], Strict(False)]
"""A list in a file, a tuple in the program."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Name = Annotated[str, Field(min_length=1)]
"""A text that is not empty."""
Count = Annotated[int, Field(ge=0, le=2**62)]
"""A whole number that an array of int64 can hold, also after a few additions."""

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
"""Configuration of a dataclass that is read by `parse_typed`: its attribute `__pydantic_config__`."""


def _element(symbol: str) -> str:
    from ase.data import chemical_symbols  # ASE takes 0.1 s to import

    if symbol not in chemical_symbols[1:]:
        raise ValueError(f"'{symbol}' is not the symbol of an element.")
    return symbol


Element = Annotated[str, AfterValidator(_element)]
"""The symbol of an element."""
Pair = Annotated[str, Field(pattern="^[A-Z][a-z]?-[A-Z][a-z]?$")]
"""Two elements, such as 'Al-Cu'."""


def _distance(text: str) -> str:
    if not 0.0 < float(text) < 1e3:
        raise ValueError(f"'{text}' is not a distance in Å.")
    return text


DistanceText = Annotated[str, AfterValidator(_distance)]
"""A distance in Å as text."""


class Section(BaseModel):
    """Base class of every table of a settings file: frozen, without unknown keys, without texts for numbers.

    The type of a field says which values are allowed, and the text under the field says what the key means; the
    reference pages of the manual are made from both. A check that concerns several fields is a `model_validator` with
    mode "after" that raises ValueError with a sentence that begins with the name of one of the section's keys.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, table: Any) -> Any:
        """Reject an unknown key before anything else: it is often the misspelt name of one that is missing."""
        if isinstance(table, Mapping):
            known = list(cls.model_fields)
            for key in table:
                if key not in known:
                    raise ValueError(f"{key} is not known{did_you_mean(str(key), known)}.")
        return table


def parse_settings(section: type[S], table: Any, where: str) -> S:
    """Return a section made from a table of a file.

    Raises ConfigError with one sentence on the first fault: `where` (the file, and the table in it), the path of the
    key, what is wrong, and what would be right.
    """
    try:
        return section.model_validate(table)
    except ValidationError as error:
        raise ConfigError(escaped(_sentence(error.errors(include_url=False)[0], where))) from error


def parse_typed(
    kind: TypeAdapter[T], text: str | bytes, where: str, raised: type[HydrazeroError] = ConfigError, hint: str = ""
) -> T:
    """Return the value of a type that a JSON text describes; the text may be of any origin.

    Wrong types, numbers out of bounds, NaN, unknown keys and lists nested without end are faults. Raises `raised` with
    one sentence on the first fault, which begins with `where` and the path of the key, and ends with `hint`.
    """
    try:
        return kind.validate_json(text)
    except ValidationError as error:
        sentence = escaped(_sentence(error.errors(include_url=False)[0], where))
        raise raised(f"{sentence.removesuffix('.')}; {hint}." if hint else sentence) from error


_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "dataclass_type": "a table",
    "int_parsing": "a whole number",
}
"""Kind of pydantic's error -> type that the value must have."""

_LIMITS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
}
"""Kind of pydantic's error -> what the number must be."""

MOST_SHOWN = 200
"""Largest number of characters of a wrong value in a sentence."""

_LENGTHS = {
    "too_short": "has {actual_length} entries; it must have at least {min_length}",
    "too_long": "has {actual_length} entries; it must have at most {max_length}",
    "string_too_short": "must not be empty",
}
"""Kind of pydantic's error -> what the length of a list or text must be."""


def _sentence(fault: ErrorDetails, where: str) -> str:
    """Return the sentence for one of pydantic's errors."""
    kind, value, facts = fault["type"], fault["input"], fault.get("ctx", {})
    place = where
    for step in fault["loc"]:
        if step != "[key]":  # pydantic's mark for the name of an entry, which the path holds already
            name = step if isinstance(step, int) or step.isprintable() else repr(step)
            place = f"{place}[{name}]" if isinstance(name, int) else _joined(place, name)
    if kind == "missing":
        return f"{place} is missing."
    if kind == "json_invalid":
        return f"{place} is not valid JSON ({facts['error']})."
    if kind == "unexpected_keyword_argument":
        return f"{place} is not known."
    if kind in _TYPES:
        return f"{place} must be {_TYPES[kind]}, not {_shown(value)}."
    if kind in _LIMITS:
        return f"{place} is {_shown(value)}; it must be {_LIMITS[kind].format(**facts)}."
    if kind in _LENGTHS:
        return f"{place} {_LENGTHS[kind].format(**facts)}."
    if kind == "literal_error":
        return _unknown_word(place, value, facts["expected"], of_key=fault["loc"][-1] == "[key]")
    if kind == "value_error":
        text = str(facts["error"])
        # The checks of a section name the key at fault themselves; those of one value do not know its name.
        return _joined(place, text) if isinstance(value, Mapping | Section) else f"{place}: {text}"
    return f"{place}: {fault['msg']}."


def _shown(value: Any) -> str:
    """Return a value as a short text."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _unknown_word(place: str, value: Any, expected: str, *, of_key: bool) -> str:
    if not isinstance(value, str):
        return f"{place} must be a text, not {value!r}."
    known = [word for word in re.findall(r"'([^']*)'", expected) if word]
    word = "" if of_key else f" '{value}'"
    return f"{place}{word} is not known{did_you_mean(value, known)}."


def _joined(where: str, key: str) -> str:
    separator = " " if where.endswith(":") else "."
    return f"{where}{separator}{key}"
