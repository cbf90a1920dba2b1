"""The manifest of a task: `manifest.json` beside the shards. It is written last: its presence means a complete task."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import ConfigError, ShardError
from hydrazero.shards.files import write_text
from hydrazero.shards.location import address, is_remote, read_whole
from hydrazero.shards.targets import TargetStatistics
from hydrazero.shards.units import INTERNAL_UNITS

FORMAT = "hydrazero-shards"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file and the blocks in it."""

    file: str
    """Name of the file beside the manifest."""
    bytes: int
    sha256: str
    structures: int
    atoms: int
    block_offsets: list[int]
    """Byte offset of the tar member of each block."""
    block_structures: list[int]
    """Number of structures in each block."""
    block_crc32: list[int]
    """CRC-32 of the bytes of each block, which is checked at every read."""


@dataclass(frozen=True, kw_only=True)
class LabelRange:
    """Statistics of one label over the training split: force components, or energies per atom."""

    count: int
    minimum: float
    maximum: float
    mean: float
    rms: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Histogram of a label."""

    edges: list[float]
    """Edges of the bins, one more than bins; the outermost bins also contain the values beyond them."""
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A structure with an extreme label."""

    source_id: str
    value: float
    """Energy minus reference energies, relative to the mean, in eV/atom; the largest force norm in eV/Å; or the largest
    component of the stress in eV/Å³."""


@dataclass(kw_only=True)
class Degrees:
    """Numbers of neighbours within one cutoff."""

    histogram: dict[int, int] = field(default_factory=dict)
    """Number of neighbours of an atom -> number of atoms."""
    most_edges: int = 0
    """Largest number of edges (neighbours of all atoms) of any structure."""
    most_edges_in: str = ""
    """Source id of the structure with the most edges."""
    most_slots: int = 0
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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a task, which is known without opening its shards."""

    task: str
    splits: dict[str, list[Shard]]
    float_dtype: str
    """Precision of positions, forces and stress in the blocks: 'float32' or 'float64'."""
    elements: dict[str, int]
    """Symbol -> number of atoms in all splits."""
    trained_elements: list[str]
    """Elements of the training split; elements that only other splits contain have no reference energy."""
    size_histogram: dict[int, int]
    """Number of atoms -> number of structures."""
    labels: dict[str, LabelRange]
    """Statistics of the training split: 'energy_per_atom', 'energy_residual_per_atom' (the energy minus reference
    energies), 'forces' and 'stress'."""
    reference_energies: dict[str, float]
    """Element -> energy per atom in eV, by the way in `references`."""
    required_labels: list[str]
    """Labels that every structure has."""
    periodic_structures: int
    references: str = "fit"
    """Where reference energies come from: 'fit' (least squares over the training split) or 'isolated' (isolated atoms)."""
    isolated_atoms: dict[str, float] = field(default_factory=dict)
    """Element -> energy in eV of a neutral isolated atom in the training split, the lowest if there are several."""
    undetermined_sums: list[dict[str, float]] = field(default_factory=list)
    """Combinations of elements, each element -> coefficient, that the training compositions leave open: any multiple
    of one may be added to the reference energies. Energies of compositions that are not orthogonal to all of them are
    arbitrary."""
    unused_stresses: int = 0
    """Number of structures with a stress that is not used, since they have no volume to which it refers."""
    warnings: list[str] = field(default_factory=list)
    """What is doubtful in the labels, in sentences."""
    targets: dict[str, TargetStatistics] = field(default_factory=dict)
    """Name -> statistics of a further quantity of the training split."""
    charged_structures: int = 0
    """Number of structures with a charge, or a spin multiplicity other than 1."""
    multiplicity_known: int = 0
    """Number of structures whose spin multiplicity is known."""
    degrees: dict[str, Degrees] = field(default_factory=dict)
    """Cutoff in Å as text -> numbers of neighbours within it, over all splits."""
    closest: dict[str, float] = field(default_factory=dict)
    """Two elements as 'Al-Cu', the lighter one first -> smallest distance in the training split in Å, rounded down to
    hundredths."""
    closest_within: float = 0.0
    """Distance in Å up to which pairs were searched: pairs that `closest` lacks are farther apart. 0 if there was no
    search."""
    distributions: dict[str, Histogram] = field(default_factory=dict)
    """Histograms of the training split: 'energy_residual_per_atom' in eV/atom and 'force_norm' in eV/Å."""
    outliers: dict[str, list[Outlier]] = field(default_factory=dict)
    """The same labels, and 'stress' in eV/Å³ -> the most extreme structures of all splits."""
    duplicates: list[str] = field(default_factory=list)
    """Duplicates as 'source id = earlier source id', at most the first 1000."""
    duplicate_count: int = 0
    set_aside: dict[str, int] = field(default_factory=dict)
    """Reason -> number of frames that were left out."""
    source: dict[str, str] = field(default_factory=dict)
    """Free text: method, basis, code, citation, licence, files."""
    units: dict[str, str] = field(default_factory=lambda: dict(INTERNAL_UNITS))

    def structures(self, split: str | None = None) -> int:
        """Return the number of structures in a split, or in all splits."""
        names = SPLITS if split is None else (split,)
        return sum(shard.structures for name in names for shard in self.splits.get(name, []))

    def atoms(self, split: str | None = None) -> int:
        """Return the number of atoms in a split, or in all splits."""
        names = SPLITS if split is None else (split,)
        return sum(shard.atoms for name in names for shard in self.splits.get(name, []))

    @property
    def max_atoms(self) -> int:
        """Number of atoms of the largest structure."""
        return max(self.size_histogram)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest to a temporary file, flush that to the disk, and rename it."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    write_text(folder / MANIFEST_NAME, json.dumps(document, indent=1, allow_nan=False), durable=True)


def read_manifest(folder: Path | str) -> Manifest:
    """Return the manifest of a folder; raise ShardError if it is missing, incomplete, or of another version."""
    path = address(str(folder), MANIFEST_NAME)
    try:
        document = json.loads(_manifest_bytes(str(folder)).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path} is not readable JSON ({error}); convert the task again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ShardError(
            f"{path} is not a manifest of hydrazero shards; name a folder that hydrazero convert has made."
        )
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {version}, but this version of hydrazero reads format version "
            f"{FORMAT_VERSION}; use a matching version of hydrazero, or convert the task again."
        )
    try:
        return _manifest_from_document(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{path} has a missing or wrong field ({error}); convert the task again.") from error


def check_different_tasks(manifests: Sequence[Manifest], folders: Sequence[Path]) -> None:
    """Raise ConfigError if two folders hold tasks of the same name."""
    names = [manifest.task for manifest in manifests]
    for name, folder in zip(names, folders, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"two of the folders hold a task '{name}' ({folder}); a run needs different names.")


def manifest_sha256(folder: Path | str) -> str:
    """Return the SHA-256 of a manifest in hexadecimal; it identifies the shards too, since their own are in it."""
    return hashlib.sha256(_manifest_bytes(str(folder))).hexdigest()


def _manifest_bytes(folder: str) -> bytes:
    if is_remote(folder):
        try:
            return read_whole(folder, MANIFEST_NAME)
        except Exception as error:  # whatever the command of webdataset's gopen raises
            raise ShardError(f"{address(folder, MANIFEST_NAME)} cannot be read ({error}).") from error
    path = Path(folder) / MANIFEST_NAME
    if not path.parent.exists():
        raise ShardError(f"{folder} does not exist; name a folder that 'hydrazero convert' has written.")
    if not path.is_file():
        raise ShardError(
            f"{folder} holds no {MANIFEST_NAME}, so it is not a finished conversion; run 'hydrazero convert'."
        )
    return path.read_bytes()


def _manifest_from_document(document: dict[str, Any]) -> Manifest:
    names = {f.name for f in fields(Manifest)}
    values = {name: value for name, value in document.items() if name in names}
    values["splits"] = {split: [Shard(**shard) for shard in shards] for split, shards in document["splits"].items()}
    values["labels"] = {name: LabelRange(**value) for name, value in document["labels"].items()}
    values["degrees"] = {
        cutoff: Degrees(**{**value, "histogram": {int(degree): n for degree, n in value["histogram"].items()}})
        for cutoff, value in document["degrees"].items()
    }
    values["distributions"] = {name: Histogram(**value) for name, value in document["distributions"].items()}
    values["outliers"] = {name: [Outlier(**one) for one in value] for name, value in document["outliers"].items()}
    values["targets"] = {name: TargetStatistics(**value) for name, value in document.get("targets", {}).items()}
    values["size_histogram"] = {int(size): count for size, count in document["size_histogram"].items()}
    return Manifest(**values)


def check_shard_files(manifest: Manifest, folder: Path | str, *, checksums: bool = False) -> None:
    """Raise ShardError if a shard is missing or its size differs from that in the manifest.

    With `checksums`, every byte is read and the SHA-256 is compared too; without it, damage is found by the CRC-32 of
    each block when it is read. Remote shards are not checked before they are read.
    """
    if is_remote(str(folder)):
        return
    for split, shards in manifest.splits.items():
        for shard in shards:
            path = Path(folder) / shard.file
            if not path.is_file():
                raise ShardError(f"shard {path} ({split}) is missing; copy it again or convert the task again.")
            size = path.stat().st_size
            if size != shard.bytes:
                raise ShardError(
                    f"shard {path} has {size} bytes, but {shard.bytes} according to the manifest: it is truncated or "
                    "changed; copy it again or convert the task again."
                )
            if checksums and file_sha256(path) != shard.sha256:
                raise ShardError(
                    f"shard {path} does not have the checksum of the manifest; copy it again or convert the task again."
                )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
