"""Units that a file itself states, in attributes, keys or metadata: used, and compared with the settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.frames import ReadSettings
from hydrazero.shards.text.foreign_text import escaped
from hydrazero.shards.units import energy_factor, force_factor, length_factor, stress_factor, target_unit

FACTORS: dict[str, Callable[[str], float]] = {
    "length": length_factor,
    "energy": energy_factor,
    "forces": force_factor,
    "stress": stress_factor,
}
"""Key of [units] -> factor of one of its units to the internal one."""

INTERNAL = {"length": "Angstrom", "energy": "eV", "forces": "eV/Angstrom", "stress": "eV/Angstrom^3"}
"""Key of [units] -> unit of a factor of 1, which is what SchNetPack writes as a number."""

QUANTITY = {"positions": "length", "cell": "length", "virial": "energy"}
"""Part of a structure -> key of [units] that it belongs to, where its name is another."""

WORDS = {
    **dict.fromkeys(("energy", "energies", "e"), "energy"),
    **dict.fromkeys(("length", "distance", "position", "positions", "coordinates", "r"), "positions"),
    **dict.fromkeys(("force", "forces", "f"), "forces"),
    "stress": "stress",
    "virial": "virial",
}
"""Word before '_unit' in the name of a key or attribute -> part of a structure."""

PER_ATOM = re.compile(r"(?P<unit>.+?)\s*(?:/|per)\s*atom", re.IGNORECASE)

NO_UNIT = ("", "1", "none", "unknown", "dimensionless", "unitless", "n/a")
"""Texts, in small letters, that stand in place of a unit and state none."""

SAME = 1e-3
"""Relative difference between factors that different values of the constants explain."""


@dataclass(frozen=True, kw_only=True)
class StatedUnit:
    """A unit that a file states."""

    unit: str | float
    """The unit as a text, or as its factor to eV or Å."""
    where: str
    """Where the file states it, as words of a sentence."""


def attributes_of(item: Any) -> dict[str, Any]:
    """Return the readable attributes of a file, group or dataset of HDF5; none of anything else."""
    found: dict[str, Any] = {}
    for name in getattr(item, "attrs", ()):
        with suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):  # of a type that h5py does not know
            value = item.attrs[name]
            if getattr(value, "shape", ()) is not None:  # an empty one has no shape
                found[name] = value
    return found


def unit_of_array(array: Any, where: str) -> StatedUnit | None:
    """Return the unit in the attribute 'units' or 'unit' of a dataset; None if it states none."""
    for name, value in attributes_of(array).items():
        if name.lower() in ("units", "unit") and (unit := _text(value)) is not None:
            return StatedUnit(unit=unit, where=f"{where}, attribute '{name}'")
    return None


def units_by_key(values: Mapping[str, Any], where: str) -> dict[str, StatedUnit]:
    """Return part -> unit for keys or attributes such as 'energy_unit', 'force_units' or sGDML's 'e_unit'.

    Forces without a unit of their own get that of the energy over that of the length, if both are stated.
    """
    found: dict[str, StatedUnit] = {}
    for name, value in values.items():
        word = name.lower()
        match = re.fullmatch(r"([a-z]+)[_ -]?units?", word) or re.fullmatch(r"units?[_ -]([a-z]+)", word)
        part = WORDS.get(match.group(1)) if match else None
        if part is not None and (unit := _text(value)) is not None:
            found[part] = StatedUnit(unit=unit, where=f"{where} '{name}'")
    if "forces" not in found and {"energy", "positions"} <= set(found):
        energy, length = found["energy"], found["positions"]
        both = f"{energy.unit}/{length.unit}"
        if unit_factor(both, "forces") is None:  # such as 'a.u.'
            both = "a.u." if energy.unit == length.unit else both
        found["forces"] = StatedUnit(unit=both, where=f"{energy.where} and {length.where.removeprefix(where)}")
    return found


def unit_factor(unit: str | float, quantity: str) -> float | None:
    """Return the factor of a unit of 'energy', 'length', 'forces' or 'stress' to eV and Å; None if it is not known."""
    if not isinstance(unit, str):
        return 1.0 if unit == 1 else None
    try:
        return FACTORS[quantity](unit)
    except SourceError:
        return None


def with_stated_units(
    settings: ReadSettings, stated: Mapping[str, StatedUnit], source: object, present: Collection[str] = ()
) -> ReadSettings:
    """Return the settings with the units that a file states for its parts (and targets, by their fields).

    `present` are the parts that the file holds, if that is known; units of others do not matter. Raises SourceError
    where the settings name another unit, where a unit is not known and the settings name none, and where only the
    energy states a unit that is not eV.
    """
    stated = {
        part: unit for part, unit in stated.items() if not _says_nothing(unit.unit) and (not present or part in present)
    }
    changes: dict[str, str] = {}
    by: dict[str, StatedUnit] = {}
    for part, unit in stated.items():
        quantity = QUANTITY.get(part, part)
        if quantity not in FACTORS:
            continue
        if quantity == "energy" and isinstance(unit.unit, str) and (match := PER_ATOM.fullmatch(unit.unit.strip())):
            if not settings.energy_per_atom:
                raise SourceError(
                    f"{source} states '{unit.unit}' for the {part} ({unit.where}); set energy_per_atom = true."
                )
            unit = replace(unit, unit=match["unit"])
        factor = unit_factor(unit.unit, quantity)
        if quantity in settings.units.model_fields_set:
            chosen = getattr(settings.units, quantity)
            if factor is not None and not _alike(FACTORS[quantity](chosen), factor):
                raise SourceError(
                    f"{source}: units.{quantity} is '{chosen}', but the file states '{unit.unit}' for the {part} "
                    f"({unit.where}); remove units.{quantity}, or correct the file."
                )
            continue
        if factor is None:
            raise SourceError(
                f"{source} states the unit '{unit.unit}' for the {part} ({unit.where}), which is not known; say what "
                f"it is by units.{quantity}."
            )
        if quantity in changes and not _alike(FACTORS[quantity](changes[quantity]), factor):
            other = by[quantity]
            raise SourceError(
                f"{source} states two units, '{other.unit}' ({other.where}) and '{unit.unit}' ({unit.where}), of which "
                f"only one can be right; say which by units.{quantity}."
            )
        changes[quantity] = unit.unit if isinstance(unit.unit, str) else INTERNAL[quantity]
        by[quantity] = unit
    _check_forces(settings, changes, source, present)
    _check_targets(settings, stated, source)
    units = settings.units.model_copy(update=changes)
    return replace(settings, units=units) if changes else settings


def _check_forces(settings: ReadSettings, changes: Mapping[str, str], source: object, present: Collection[str]) -> None:
    """Raise SourceError for forces without a unit beside energies that are stated to be in another unit than eV."""
    energy = changes.get("energy", "eV")
    stated = "forces" in changes or "forces" in settings.units.model_fields_set
    if "forces" in present and not stated and not _alike(energy_factor(energy), 1.0):
        raise SourceError(
            f"{source} states the unit '{energy}' for the energy and none for the forces; name it by units.forces."
        )


def _check_targets(settings: ReadSettings, stated: Mapping[str, StatedUnit], source: object) -> None:
    """Raise SourceError for a target whose unit is another one than the file states."""
    for name, target in settings.targets.items():
        unit = stated.get(target.field)
        if unit is None or not isinstance(unit.unit, str):
            continue
        try:
            factor, internal = target_unit(unit.unit)
        except SourceError:
            continue  # a unit that no target can have: the values stay as they are
        chosen, kind = target_unit(target.unit)
        if kind != internal or not _alike(chosen, factor):
            raise SourceError(
                f"{source}: the unit of the target '{name}' is '{target.unit}', but the file states '{unit.unit}' "
                f"({unit.where}); set targets.{name}.unit = '{unit.unit}', or correct the file."
            )


def schnetpack_units(metadata: Mapping[str, Any], settings: ReadSettings) -> dict[str, StatedUnit]:
    """Return part -> unit in the metadata that SchNetPack writes into a database; a unit may be a factor there."""
    found: dict[str, StatedUnit] = {}
    length = metadata.get("_distance_unit")
    if isinstance(length, str | int | float):
        found["positions"] = StatedUnit(unit=_unit(length), where="metadata '_distance_unit'")
    properties = metadata.get("_property_unit_dict")
    if not isinstance(properties, Mapping):
        return found
    fields = {part: getattr(settings.fields, part) for part in ("energy", "forces", "stress", "virial")}
    fields |= {target.field: target.field for target in settings.targets.values()}
    for part, name in fields.items():
        if name and isinstance(properties.get(name), str | int | float):
            found[part] = StatedUnit(unit=_unit(properties[name]), where=f"metadata '_property_unit_dict', '{name}'")
    return found


def _unit(value: str | float) -> str | float:
    return escaped(value[:40]) if isinstance(value, str) else value


def _says_nothing(unit: str | float) -> bool:
    return isinstance(unit, str) and unit.strip().lower() in NO_UNIT


def _text(value: Any) -> str | None:
    """Return a text that is stored as a text, as bytes, or as an array of one of them; None for anything else."""
    item = value.item() if isinstance(value, np.ndarray | np.generic) and np.size(value) == 1 else value
    text = item.decode("utf-8", "replace") if isinstance(item, bytes) else item
    return escaped(text[:40]) if isinstance(text, str) else None


def _alike(one: float, other: float) -> bool:
    # The sign is a convention, which units of files do not state.
    return abs(abs(one) - abs(other)) <= SAME * abs(other)
