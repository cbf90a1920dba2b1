"""Names of the parts of a structure in a source of named columns or keys."""

from __future__ import annotations

from hydrazero.shards.readers.frames import ReadSettings

LABELS = ("energy", "forces", "stress", "virial", "charge", "multiplicity")


def column_names(settings: ReadSettings) -> dict[str, str]:
    """Return part of a structure -> name in the source.

    The name is that of [columns], otherwise that of [fields], otherwise that of the part. Fields of targets are
    included; labels whose name is empty in [fields] are not.
    """
    names = {target.field: target.field for target in settings.targets.values()}
    names |= {part: part for part in ("numbers", "positions", "cell", "pbc")}
    names |= {label: getattr(settings.fields, label) for label in LABELS if getattr(settings.fields, label)}
    return names | dict(settings.columns)
