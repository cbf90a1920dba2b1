"""Where the parts of a structure are in a source of named columns or keys."""

from __future__ import annotations

from hydrazero.shards.readers.frames import ReadSettings

LABELS = ("energy", "forces", "stress", "virial", "charge", "multiplicity")


def column_names(settings: ReadSettings) -> dict[str, str]:
    """Return part of a structure -> name in the source: the settings' columns, else their fields, else the part itself.

    Labels that the settings leave nameless are not in it; fields of targets are.
    """
    names = {target.field: target.field for target in settings.targets.values()}
    names |= {part: part for part in ("numbers", "positions", "cell", "pbc")}
    names |= {label: getattr(settings.fields, label) for label in LABELS if getattr(settings.fields, label)}
    return names | dict(settings.columns)
