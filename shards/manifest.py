"""The manifest of a task's shards: `manifest.json` beside the tars, written last, so that its presence means done."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydrazero.shards.errors import ShardError
from hydrazero.shards.files import write_text
from hydrazero.shards.location import address, is_remote, read_whole
from hydrazero.shards.targets import TargetFacts
from hydrazero.shards.units import INTERNAL_UNITS

FORMAT = "hydrazero-shards"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file and the blocks in it."""

    file: str
    """Name beside the manifest."""
    bytes: int
    sha256: str
    structures: int
    atoms: int
    block_offsets: list[int]
    """Byte at which each block's tar member starts."""
    block_structures: list[int]
    """Structures in each block."""
    block_crc32: list[int]
    """CRC-32 of each block's bytes, checked at every read."""


@dataclass(frozen=True, kw_only=True)
class LabelRange:
    """Count and range of one label over the task; forces per component, energy per atom."""

    count: int
    minimum: float
    maximum: float
    mean: float
    rms: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Values of a label in bins."""

    edges: list[float]
    """Of the bins, one more than there are; the outermost hold what is beyond them too."""
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A structure whose label stands out."""

    source_id: str
    value: float
    """eV per atom away from the mean after references, or the largest force norm, eV/Å."""


@dataclass(kw_only=True)
class Degrees:
    """Neighbours within one cutoff."""

    histogram: dict[int, int] = field(default_factory=dict)
    """Neighbours of an atom -> atoms."""
    most_edges: int = 0
    """Neighbours of all atoms of the structure that has most."""
    most_edges_in: str = ""
    """Its source id."""
    most_slots: int = 0
    """Neighbour slots, in whole rows, of the structure that takes most."""
    most_slots_in: str = ""

    @property
    def edges(self) -> int:
        """Neighbours of all atoms."""
        return sum(degree * atoms for degree, atoms in self.histogram.items())

    def slots(self, row: int) -> int:
        """Slots of all atoms, in whole rows of `row`."""
        return sum(-(-degree // row) * row * atoms for degree, atoms in self.histogram.items())

    def add(self, degrees: NDArray[np.int64], source_id: str, row: int) -> None:
        """Count one structure, given the neighbours of each of its atoms."""
        counts = Counter(degrees.tolist())
        one = Degrees(histogram=dict(counts), most_edges=int(degrees.sum()), most_edges_in=source_id)
        one.most_slots, one.most_slots_in = one.slots(row), source_id
        self.merge(one)

    def merge(self, other: Degrees) -> None:
        """Count what another has counted."""
        for degree, atoms in other.histogram.items():
            self.histogram[degree] = self.histogram.get(degree, 0) + atoms
        if other.most_edges > self.most_edges:
            self.most_edges, self.most_edges_in = other.most_edges, other.most_edges_in
        if other.most_slots > self.most_slots:
            self.most_slots, self.most_slots_in = other.most_slots, other.most_slots_in


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a reader of the shards needs to know without opening them."""

    task: str
    splits: dict[str, list[Shard]]
    float_dtype: str
    """Of positions, forces and stress in the blocks."""
    elements: dict[str, int]
    """Symbol -> atoms of it, in all splits."""
    trained_elements: list[str]
    """Elements of the training split; those that only the others hold have no reference energy."""
    size_histogram: dict[int, int]
    """Atoms per structure -> structures."""
    labels: dict[str, LabelRange]
    """Of the training split: 'energy_per_atom', 'energy_residual_per_atom' (less references), 'forces', 'stress'."""
    reference_energies: dict[str, float]
    """eV per atom of each element: least squares on the training split."""
    required_labels: list[str]
    """Labels that every structure has."""
    periodic_structures: int
    targets: dict[str, TargetFacts] = field(default_factory=dict)
    """Other quantities that structures of the training split have."""
    charged_structures: int = 0
    """Structures with a charge, or a spin multiplicity other than 1."""
    multiplicity_known: int = 0
    """Structures that say their spin multiplicity."""
    degrees: dict[str, Degrees] = field(default_factory=dict)
    """Cutoff in Å, as text -> neighbours within it, over all splits."""
    closest: dict[str, float] = field(default_factory=dict)
    """Two elements as 'Al-Cu', the lighter first -> smallest distance in the training split, Å, in hundredths."""
    closest_within: float = 0.0
    """Å: pairs of elements that `closest` lacks are nowhere closer than this; 0: nobody has looked."""
    distributions: dict[str, Histogram] = field(default_factory=dict)
    """Of the training split: 'energy_residual_per_atom' eV/atom and 'force_norm' eV/Å."""
    outliers: dict[str, list[Outlier]] = field(default_factory=dict)
    """The same labels -> structures of all splits that stand out most."""
    duplicates: list[str] = field(default_factory=list)
    """'source id = earlier source id', at most the first 1000."""
    duplicate_count: int = 0
    set_aside: dict[str, int] = field(default_factory=dict)
    """Frames that were left out, by reason."""
    source: dict[str, str] = field(default_factory=dict)
    """Free text: method, basis, code, citation, licence, files."""
    units: dict[str, str] = field(default_factory=lambda: dict(INTERNAL_UNITS))

    def structures(self, split: str | None = None) -> int:
        """Structures in a split, or in all."""
        names = SPLITS if split is None else (split,)
        return sum(shard.structures for name in names for shard in self.splits.get(name, []))

    def atoms(self, split: str | None = None) -> int:
        """Atoms in a split, or in all."""
        names = SPLITS if split is None else (split,)
        return sum(shard.atoms for name in names for shard in self.splits.get(name, []))

    @property
    def max_atoms(self) -> int:
        """Atoms of the largest structure."""
        return max(self.size_histogram)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest to a temporary file, flush that to the disk, and rename it."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    write_text(folder / MANIFEST_NAME, json.dumps(document, indent=1, allow_nan=False), durable=True)


def read_manifest(folder: Path | str) -> Manifest:
    """Read and check a manifest; raises ShardError if it is missing, not ours, newer, or incomplete."""
    path = address(str(folder), MANIFEST_NAME)
    try:
        document = json.loads(_manifest_bytes(str(folder)).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path} is not readable JSON ({error}); convert the task again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ShardError(f"{path} is not a manifest of hydrazero shards.")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {version}, this hydrazero reads version {FORMAT_VERSION}; "
            "use a matching hydrazero or convert the task again."
        )
    try:
        return _manifest_from_document(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{path} lacks or misuses a field ({error}); convert the task again.") from error


def manifest_sha256(folder: Path | str) -> str:
    """Return the SHA-256 of a manifest in hexadecimal, which stands for the shards, whose own are in it."""
    return hashlib.sha256(_manifest_bytes(str(folder))).hexdigest()


def _manifest_bytes(folder: str) -> bytes:
    if is_remote(folder):
        try:
            return read_whole(folder, MANIFEST_NAME)
        except Exception as error:  # what the command behind webdataset's gopen fails with
            raise ShardError(f"{address(folder, MANIFEST_NAME)} cannot be read ({error}).") from error
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ShardError(f"{folder} holds no {MANIFEST_NAME}: it is no finished conversion; run 'hydrazero convert'.")
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
    values["targets"] = {name: TargetFacts(**value) for name, value in document.get("targets", {}).items()}
    values["size_histogram"] = {int(size): count for size, count in document["size_histogram"].items()}
    return Manifest(**values)


def check_shard_files(manifest: Manifest, folder: Path | str, *, checksums: bool = False) -> None:
    """Raise ShardError if a shard is missing or has another size than the manifest says.

    With `checksums` every byte is read and the SHA-256 compared too; without, damage is found by the CRC-32 of each
    block when it is read. Remote shards are not looked at before they are read.
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
                    f"shard {path} has {size} bytes where the manifest says {shard.bytes}: it is truncated or changed; "
                    "copy it again or convert the task again."
                )
            if checksums and file_sha256(path) != shard.sha256:
                raise ShardError(
                    f"shard {path} has another checksum than the manifest says; copy or convert the task again."
                )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
