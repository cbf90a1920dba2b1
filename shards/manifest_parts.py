"""Parts of a manifest: shards, and statistics of labels and neighbours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from tarfile import BLOCKSIZE
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from hydrazero.shards.block import BLOCK_STRUCTURES
from hydrazero.shards.settings_parser import STRICT, Count
from hydrazero.shards.structure import MAX_MAGNITUDE
from hydrazero.shards.text.names import FileName

SMALLEST_STRUCTURE = 88
"""Number of bytes that a structure takes in a block at least, of which 72 are for its cell."""
Number = Annotated[float, Field(ge=-MAX_MAGNITUDE * 1e6, le=MAX_MAGNITUDE * 1e6)]
"""A number that may be the energy of a large structure in eV, or the sum of a few such numbers."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file and the blocks in it."""

    __pydantic_config__ = STRICT

    file: FileName
    """Name of the file beside the manifest."""
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    structures: Count
    atoms: Count
    block_offsets: list[Count]
    """Byte offset of the tar member of each block."""
    block_structures: list[Annotated[int, Field(ge=1, le=BLOCK_STRUCTURES)]]
    """Number of structures in each block."""
    block_crc32: list[Annotated[int, Field(ge=0, lt=2**32)]]
    """CRC-32 of the bytes of each block, which is checked at every read."""


@dataclass(frozen=True, kw_only=True)
class LabelRange:
    """Statistics of one label over the training split: force components, or energies per atom."""

    __pydantic_config__ = STRICT

    count: PositiveInt
    minimum: Number
    maximum: Number
    mean: Number
    rms: Annotated[Number, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Histogram of a label."""

    __pydantic_config__ = STRICT

    edges: list[Number]
    """Edges of the bins, one more than bins; the outermost bins also contain the values beyond them."""
    counts: list[Count]


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A structure with an extreme label."""

    __pydantic_config__ = STRICT

    source_id: str
    value: Number
    """Energy minus reference energies, relative to the mean, in eV/atom; the largest force norm in eV/Å; or the largest
    component of the stress in eV/Å³."""


@dataclass(kw_only=True)
class Degrees:
    """Numbers of neighbours within one cutoff."""

    __pydantic_config__ = STRICT

    histogram: dict[Count, Count] = field(default_factory=dict)
    """Number of neighbours of an atom -> number of atoms."""
    most_edges: Count = 0
    """Largest number of edges (neighbours of all atoms) of any structure."""
    most_edges_in: str = ""
    """Source id of the structure with the most edges."""
    most_slots: Count = 0
    """Largest number of neighbour slots, in complete rows, of any structure."""
    most_slots_in: str = ""
    """Source id of the structure with the most slots."""

    @property
    def edges(self) -> int:
        """Number of neighbours of all atoms."""
        return sum(degree * atoms for degree, atoms in self.histogram.items())

    def slots(self, row: int) -> int:
        """Return the number of slots of all atoms, in complete rows of `row` slots."""
        return sum(-(-degree // row) * row * atoms for degree, atoms in self.histogram.items())

    def add(self, degrees: NDArray[np.int64], source_id: str, row: int) -> None:
        """Add one structure, given the number of neighbours of each of its atoms, [atoms]."""
        counts = Counter(degrees.tolist())
        one = Degrees(histogram=dict(counts), most_edges=int(degrees.sum()), most_edges_in=source_id)
        one.most_slots, one.most_slots_in = one.slots(row), source_id
        self.merge(one)

    def merge(self, other: Degrees) -> None:
        """Add the numbers of other structures."""
        for degree, atoms in other.histogram.items():
            self.histogram[degree] = self.histogram.get(degree, 0) + atoms
        if other.most_edges > self.most_edges:
            self.most_edges, self.most_edges_in = other.most_edges, other.most_edges_in
        if other.most_slots > self.most_slots:
            self.most_slots, self.most_slots_in = other.most_slots, other.most_slots_in


def shard_contradiction(shard: Shard) -> str:
    """Return what in the description of a shard does not fit the rest of it, "" if all fits."""
    offsets, structures = shard.block_offsets, shard.block_structures
    if not len(offsets) == len(structures) == len(shard.block_crc32):
        return "its lists of blocks have different lengths"
    if sum(structures) != shard.structures or shard.atoms < shard.structures:
        return f"{shard.structures:,} structures and {shard.atoms:,} atoms do not fit its blocks"
    for begin, end, count in zip(offsets, [*offsets[1:], shard.bytes], structures, strict=True):
        if begin % BLOCKSIZE or end - begin < BLOCKSIZE + count * SMALLEST_STRUCTURE:
            return f"no block of {count} structures fits between bytes {begin} and {end}"
    return ""


def is_consistent(label: LabelRange) -> bool:
    """Return whether minimum, mean, root mean square and maximum can belong to the same numbers."""
    largest = max(abs(label.minimum), abs(label.maximum))
    room = 1e-6 * largest + 1e-12
    ordered = label.minimum <= label.mean + room and label.mean <= label.maximum + room
    return ordered and abs(label.mean) <= label.rms + room and label.rms <= largest + room
