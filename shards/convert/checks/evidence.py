"""What the checks of labels need to know of a task, gathered while its index is built."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.convert.checks.magnitudes import EnergySample
from hydrazero.shards.convert.checks.methods import MethodFields
from hydrazero.shards.convert.checks.unread_conditions import UnreadConditions
from hydrazero.shards.convert.checks.unread_stress import UnreadStress
from hydrazero.shards.convert.frames import ChunkFile
from hydrazero.shards.readers.frames import SourceUnits
from hydrazero.shards.structure import FloatArray

SAMPLE = 5_000
"""Number of frames whose energies are compared; if a task has more, one of so many is taken."""
MOST_PAIRS = 200_000
"""Number of pairs of successive frames that are compared."""


class Evidence:
    """Pairs of successive frames, and energies of a sample of structures."""

    def __init__(self, frames: int) -> None:
        """Start for a number of frames."""
        self.every = max(-(-frames // SAMPLE), 1)
        self._pairs: dict[int, list[FloatArray]] = {}
        self._kept = 0
        self._counts: list[FloatArray] = []
        self._energies: list[NDArray[np.float64]] = []
        self._names: list[str] = []
        self.methods = MethodFields()
        """Values of the fields that name the method of the labels."""
        self.unread_conditions = UnreadConditions()
        """Values of fields that look like a charge or a spin and are not read."""
        self.unread_stress = UnreadStress()
        """Names of fields that look like a stress and are not read."""
        self.units: SourceUnits | None = None
        """Units of the first structure, which a file may state."""

    def add(self, source: int, first: int, file: ChunkFile) -> None:
        """Take what is needed of a chunk, of which `first` is the number of its first structure."""
        self.units = self.units or file.units
        self.methods.merge(file.methods)
        self.unread_conditions.merge(file.unread_conditions)
        self.unread_stress.merge(file.unread_stress)
        pairs = file.column("work")
        if len(pairs) and self._kept < MOST_PAIRS:
            self._pairs.setdefault(source, []).append(pairs)
            self._kept += len(pairs)
        energies = file.column("energy")
        rows = np.arange(-first % self.every, len(energies), self.every)
        rows = rows[~np.isnan(energies[rows])]
        if not len(rows):
            return
        starts, numbers = file.column("atom_starts"), file.column("numbers")
        counts = [np.bincount(numbers[starts[row] : starts[row + 1]], minlength=119) for row in rows]
        self._counts.append(np.array(counts, dtype=np.float64))
        self._energies.append(energies[rows])
        text, names = file.column("source_ids").tobytes(), file.column("name_starts")
        self._names += [text[names[row] : names[row + 1] - 1].decode() for row in rows]

    def pairs(self) -> dict[int, FloatArray]:
        """Return source -> table of its pairs; see `WorkPairs.table`."""
        return {source: np.concatenate(tables) for source, tables in self._pairs.items()}

    def sample(self) -> EnergySample:
        """Return the sample of energies."""
        return EnergySample(
            counts=np.concatenate(self._counts) if self._counts else np.zeros((0, 119)),
            energies=np.concatenate(self._energies) if self._energies else np.zeros(0),
            names=self._names,
            every=self.every,
        )
