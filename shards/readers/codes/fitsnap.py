"""JSON files of FitSNAP: labelled configurations with the units that the file names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.files import decoded, parse_json
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import READ_ERRORS, open_binary
from hydrazero.shards.readers.parts.frame_parts import frame_of_parts
from hydrazero.shards.readers.parts.stated_units import StatedUnit, with_stated_units

KEYS = {
    "numbers": "AtomTypes",
    "positions": "Positions",
    "cell": "Lattice",
    "energy": "Energy",
    "forces": "Forces",
    "stress": "Stress",
    "charge": "Charge",
}
"""Part of a structure -> its key in a configuration."""
STYLES = {
    "positions": "PositionsStyle",
    "cell": "LatticeStyle",
    "energy": "EnergyStyle",
    "forces": "ForcesStyle",
    "stress": "StressStyle",
}
"""Part of a structure -> key of its unit."""
DEFAULTS = {
    "positions": "angstrom",
    "cell": "angstrom",
    "energy": "electronvolt",
    "forces": "electronvoltperangstrom",
    "stress": "bar",
}
"""Units where a file names none: those of LAMMPS's units 'metal', in which FitSNAP computes."""
WORDS = {
    "kilocalorie": "kcal/mol",
    "kilojoule": "kJ/mol",
    "kilocaloriepermole": "kcal/mol",
    "kcalpermole": "kcal/mol",
    "kcal_per_mole": "kcal/mol",
    "kjpermole": "kJ/mol",
    "bars": "bar",
    "kb": "kbar",
    "kilobar": "kbar",
    "gigapascal": "GPa",
    "pascal": "Pa",
    "pascals": "Pa",
    "nanometer": "nm",
}
"""Names of units in FitSNAP, in small letters, that are not names here."""
SHOWN = str | int | float


@reader(further_suffixes=(".json",))
def read_fitsnap(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the configurations of a FitSNAP file; a first line that begins with '#' is a comment.

    The units are those of 'EnergyStyle' and the other styles. A stress is that of LAMMPS, positive under compression.
    The name of the folder becomes the field 'group', by which FitSNAP groups its files. Raises SourceError for another
    layout, or where the settings contradict the units of the file.
    """
    dataset = _dataset(path)
    entries = dataset["Data"]
    held = {part for part, key in KEYS.items() if any(isinstance(one, dict) and key in one for one in entries)}
    maker = FrameMaker(with_stated_units(settings, _units(dataset), path, held))
    names = {part: _key(settings, part) for part in KEYS}
    info = {name: value for name, value in dataset.items() if isinstance(value, SHOWN)}
    for number, entry in enumerate(entries):
        source_id = f"{path.name}#{number}"
        fields = {**info, "group": path.absolute().parent.name}
        read = partial(_frame, entry, names, source_id, maker, fields)
        yield UnreadFrame(source_id=source_id, read=read, fraction=(number + 1) / len(entries))


def _dataset(path: Path) -> dict[str, Any]:
    try:
        with open_binary(path) as (file, _):
            text = decoded(file.read())
    except READ_ERRORS as error:
        raise SourceError(f"{path} cannot be read to its end ({brief(error)}); copy it again.") from error
    if text.lstrip().startswith("#"):
        text = text.partition("\n")[2]
    document = parse_json(text, str(path), error=SourceError)
    dataset = document.get("Dataset") if isinstance(document, dict) else None
    if not isinstance(dataset, dict) or not isinstance(dataset.get("Data"), list):
        raise SourceError(f"{path} has no 'Dataset' with a list 'Data', so it is not a file of FitSNAP.")
    style = dataset.get("AtomTypeStyle", "chemicalsymbol")
    if style != "chemicalsymbol":
        raise SourceError(
            f"{path}: 'AtomTypeStyle' is {style!r}; only 'chemicalsymbol' says which elements the types are."
        )
    return dataset


def _key(settings: ReadSettings, part: str) -> str:
    """Return the key of a part: that of the settings if they name one, otherwise that of FitSNAP."""
    named = settings.columns.get(part)
    if named is None and part in settings.fields.model_fields_set:
        named = getattr(settings.fields, part)
    return KEYS[part] if named is None else named


def _units(dataset: Mapping[str, Any]) -> dict[str, StatedUnit]:
    """Return part -> unit, by the styles of a file; the sign of the stress is LAMMPS's."""
    found = {}
    for part, key in STYLES.items():
        style = dataset.get(key, DEFAULTS[part])
        unit = _unit(str(style))
        found[part] = StatedUnit(unit=f"-{unit}" if part == "stress" else unit, where=f"'{key}': '{style}'")
    return found


def _unit(style: str) -> str:
    """Return the name of a unit here; quotients are written as 'electronvoltperangstrom' or 'hartree_per_bohr'."""
    word = style.strip().lower()
    if word in WORDS:
        return WORDS[word]
    energy, per, length = word.replace("_per_", "per").rpartition("per")
    return f"{WORDS.get(energy, energy)}/{WORDS.get(length, length)}" if per else style.strip()


def _frame(entry: Any, names: Mapping[str, str], source_id: str, maker: FrameMaker, info: Mapping[str, Any]) -> Frame:
    if not isinstance(entry, dict):
        fault = StructureError("unreadable", "the configuration is not an object")
        return Frame(source_id=source_id, error=fault, info=info)
    parts: dict[str, Any] = {part: entry[key] for part, key in names.items() if entry.get(key) is not None}
    fields = {**info, **{name: value for name, value in entry.items() if isinstance(value, SHOWN)}}
    return frame_of_parts({**parts, "pbc": True}, source_id, maker, info=fields, other=entry)
