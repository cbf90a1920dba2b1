"""NumPy archives of one molecule in many geometries: the sGDML and the rMD17 layouts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.frames import Frame, FrameMaker, RawFrame, ReadSettings

LAYOUTS = (
    {"numbers": "z", "positions": "R", "energy": "E", "forces": "F"},
    {"numbers": "nuclear_charges", "positions": "coords", "energy": "energies", "forces": "forces"},
)
"""Keys of the sGDML layout (Chmiela et al. 2019) and of rMD17 (Christensen and von Lilienfeld 2020)."""


def read_npz(path: Path, settings: ReadSettings) -> Iterator[Frame]:
    """Read the frames of an archive; raises SourceError if its keys or shapes do not fit."""
    maker = FrameMaker(settings)
    try:
        with np.load(path, allow_pickle=False) as archive:
            layout = next((keys for keys in LAYOUTS if keys["positions"] in archive.files), None)
            if layout is None or layout["numbers"] not in archive.files:
                raise SourceError(
                    f"{path} has the keys {', '.join(archive.files)}: neither the sGDML nor rMD17 layout."
                )
            columns: dict[str, Any] = {name: archive[key] for name, key in layout.items() if key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path} is no readable npz archive ({error}).") from error
    frames = len(columns["positions"])
    for name in ("energy", "forces"):
        if name in columns and len(columns[name]) != frames:
            raise SourceError(f"{path}: '{layout[name]}' has {len(columns[name])} frames, the positions have {frames}.")
    for number in range(frames):
        raw = RawFrame(
            numbers=columns["numbers"],
            positions=columns["positions"][number],
            cell=np.zeros((3, 3)),
            pbc=False,
            energy=columns["energy"][number] if "energy" in columns else None,
            forces=columns["forces"][number] if "forces" in columns else None,
        )
        yield maker.make(raw, f"{path.name}#{number}", {})
